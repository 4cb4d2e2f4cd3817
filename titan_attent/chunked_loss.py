"""loss.py's weighted cross-entropy in chunks of tokens: no second copy of the logits, or none at all.

Two functions, equal to ``weighted_cross_entropy`` up to rounding:

    chunked_weighted_cross_entropy   takes the logits. Only one chunk is ever upcast to fp32; the gradient can take the
                                     logits' own memory, so the peak is the logits themselves.
    chunked_linear_cross_entropy     takes the hidden states and the output layer's weight. A chunk's logits, its loss
                                     and both gradients are computed in the forward pass, one chunk after the other; the
                                     logits of a whole batch never exist.

torch's own way keeps the logits and a gradient of the same size when compiled, and several fp32 copies beside them when
not. The chunked head is known from Liger Kernel (arXiv 2410.10989) and torchtune; this is an implementation of its own.

Cost, with N = B L tokens and chunks of C: 12 N bytes of row statistics and 4 C V (eager) or 0 (compiled) bytes of
scratch beside the logits; for the head 2 or 4 C V bytes of logits and one fp32 V D accumulator. Each chunk is read
twice forward, and read and written once backward. No collective.

Shapes: B examples, L tokens, N = B L, C tokens of a chunk, V vocabulary, D width of the hidden states.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_attent.loss import IGNORE_INDEX, WeightedLoss


def _row_statistics(logits_CV: Tensor, squares: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Largest logit, sum of e = exp(z - largest), and sum of e^2 if asked for: fp32 [C] each."""
    maximum_C = logits_CV.amax(dim=-1).float()
    e_CV = logits_CV.to(torch.float32, copy=True).sub_(maximum_C[:, None]).exp_()
    return maximum_C, e_CV.sum(dim=-1), e_CV.square_().sum(dim=-1) if squares else None


def _scaled_exponential_(logits_CV: Tensor, maximum_C: Tensor, factor_C: Tensor) -> None:
    """In place: z -> factor exp(z - maximum), computed in fp32."""
    logits_CV.copy_(logits_CV.to(torch.float32, copy=True).sub_(maximum_C[:, None]).exp_().mul_(factor_C[:, None]))


class _Kernels(NamedTuple):
    """The two passes over a chunk; compiled, they need no fp32 scratch."""

    row_statistics: Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor | None]]
    scaled_exponential_: Callable[[Tensor, Tensor, Tensor], None]


_EAGER = _Kernels(_row_statistics, _scaled_exponential_)


class _TokenLosses(NamedTuple):
    """Of all tokens, fp32 [N]: the loss, and what a gradient needs; 0 loss where the label is ignored."""

    loss_N: Tensor
    maximum_N: Tensor
    total_N: Tensor
    squared_N: Tensor | None


def _token_losses(logits_CV: Tensor, labels_C: Tensor, *, squares: bool, kernels: _Kernels) -> _TokenLosses:
    maximum_C, total_C, total_squares_C = kernels.row_statistics(logits_CV, squares)
    label_logit_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0].float()
    loss_C = torch.where(labels_C != IGNORE_INDEX, total_C.log() - (label_logit_C - maximum_C), 0.0)
    squared_C = None
    if total_squares_C is not None:  # sum_v p_v^2 - 2 p_y + 1, see loss.py
        squared_C = total_squares_C / total_C.square() - 2 * (-loss_C).exp() + 1
    return _TokenLosses(loss_C, maximum_C, total_C, squared_C)


def _gradient_(logits_CV: Tensor, labels_C: Tensor, scale_C: Tensor, losses: _TokenLosses, kernels: _Kernels) -> None:
    """In place: logits -> scale (softmax - onehot), 0 where the label is ignored."""
    scale_C = torch.where(labels_C != IGNORE_INDEX, scale_C, 0.0)
    kernels.scaled_exponential_(logits_CV, losses.maximum_N, scale_C / losses.total_N)
    at_label_C = torch.expm1(-losses.loss_N) * scale_C  # p_y - 1 without cancellation
    # Not scatter_, which on CPU makes an fp32 copy of a bf16 tensor.
    rows_C = torch.arange(len(labels_C), device=labels_C.device)
    logits_CV.index_put_((rows_C, labels_C.clamp(min=0)), at_label_C.to(logits_CV.dtype))


def _chunks(num_tokens: int, num_chunks: int) -> Iterator[slice]:
    size = max(1, -(-num_tokens // num_chunks))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _concatenated(parts: list[_TokenLosses]) -> _TokenLosses:
    loss, maximum, total, squared = zip(*parts, strict=True)
    return _TokenLosses(
        torch.cat(loss), torch.cat(maximum), torch.cat(total), None if squared[0] is None else torch.cat(squared)
    )


class _LossesOfLogits(torch.autograd.Function):
    """logits [N, V], labels [N] -> token losses fp32 [N] and, not differentiable, the squared norms [N] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        num_chunks: int,
        squares: bool,
        overwrite: bool,
        kernels: _Kernels,
    ) -> tuple[Tensor, Tensor | None]:
        losses = _concatenated(
            [
                _token_losses(logits_NV[rows], labels_N[rows], squares=squares, kernels=kernels)
                for rows in _chunks(len(labels_N), num_chunks)
            ]
        )
        ctx.num_chunks, ctx.overwrite, ctx.kernels = num_chunks, overwrite, kernels
        ctx.save_for_backward(logits_NV, labels_N, *losses[:3])
        ctx.set_materialize_grads(False)
        if losses.squared_N is not None:
            ctx.mark_non_differentiable(losses.squared_N)
        return losses.loss_N, losses.squared_N

    @staticmethod
    def backward(ctx: Any, scale_N: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None, None]:
        if scale_N is None:
            return None, None, None, None, None, None
        logits_NV, labels_N, *statistics = ctx.saved_tensors
        # detach() shares the version counter: whoever needs the logits after this gets autograd's error.
        gradient_NV = logits_NV.detach() if ctx.overwrite else logits_NV.clone()
        for rows in _chunks(len(labels_N), ctx.num_chunks):
            loss, maximum, total = (tensor[rows] for tensor in statistics)
            losses = _TokenLosses(loss, maximum, total, None)
            _gradient_(gradient_NV[rows], labels_N[rows], scale_N[rows], losses, ctx.kernels)
        return gradient_NV, None, None, None, None, None


class _LossesOfHidden(torch.autograd.Function):
    """hidden [N, D], weight [V, D], labels [N], token weights [N] -> weighted sum; token losses and squared norms [N].

    Only the weighted sum is differentiable. Its gradients are made here, where a chunk's logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        num_chunks: int,
        squares: bool,
        differentiate: bool,
        kernels: _Kernels,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        need_hidden, need_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight_VD: Tensor | None = None
        parts = []
        for rows in _chunks(len(labels_N), num_chunks):
            hidden_CD, labels_C = hidden_ND[rows], labels_N[rows]
            logits_CV = hidden_CD @ weight_VD.t()
            parts.append(_token_losses(logits_CV, labels_C, squares=squares, kernels=kernels))
            if need_hidden or need_weight:
                _gradient_(logits_CV, labels_C, weights_N[rows], parts[-1], kernels)
            if grad_hidden_ND is not None:
                torch.mm(logits_CV, weight_VD, out=grad_hidden_ND[rows])
            if need_weight:
                part_VD = logits_CV.t() @ hidden_CD
                grad_weight_VD = part_VD.float() if grad_weight_VD is None else grad_weight_VD.add_(part_VD)
                del part_VD
            del logits_CV  # before the next chunk's
        losses = _concatenated(parts)
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses.loss_N, *([] if losses.squared_N is None else [losses.squared_N]))
        return (losses.loss_N * weights_N).sum(), losses.loss_N, losses.squared_N

    @staticmethod
    def backward(ctx: Any, scale: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        nones = (None,) * 6
        if scale is None:
            return None, None, *nones
        if grad_hidden_ND is not None:
            grad_hidden_ND = (grad_hidden_ND.float() * scale).to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:  # scaled in fp32, without an fp32 copy
            out = torch.empty_like(grad_weight_VD, dtype=ctx.weight_dtype)
            grad_weight_VD = torch.mul(grad_weight_VD, scale, out=out)
        return grad_hidden_ND, grad_weight_VD, *nones


def _check(num_chunks: int, *tensors: Tensor) -> None:
    if num_chunks < 1:
        raise ValueError(f"num_chunks = {num_chunks}: the loss needs at least 1 chunk of tokens")
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        raise ValueError(
            "the chunked loss takes plain tensors, not DTensors: where a tensor-parallel rank holds a part of the "
            "vocabulary, use a loss made for that"
        )


def _fold(
    weighted: Tensor, loss_N: Tensor, squared_N: Tensor | None, labels_BL: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Token values to what ``weighted_cross_entropy`` returns; all but ``weighted`` are detached."""
    valid_BL = labels_BL != IGNORE_INDEX
    counts_B = valid_BL.sum(dim=1).clamp(min=1)
    sums_B = loss_N.detach().view_as(labels_BL).sum(dim=1)
    norms_B = None
    if squared_N is not None:
        squared_B = torch.where(valid_BL, squared_N.view_as(labels_BL), 0.0).sum(dim=1)
        norms_B = (squared_B / counts_B).clamp(min=0.0).sqrt()
    return weighted, sums_B.sum(), sums_B / counts_B, norms_B


def chunked_weighted_cross_entropy(
    logits_BLV: Tensor,
    labels_BL: Tensor,
    weights_B: Tensor,
    *,
    num_chunks: int,
    with_gradient: bool = False,
    overwrite: bool = False,
    kernels: _Kernels = _EAGER,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`titan_attent.loss.weighted_cross_entropy`, with one chunk of tokens in fp32 at a time.

    Args:
        logits_BLV, labels_BL, weights_B, with_gradient: as there.
        num_chunks: at least 1; the B L tokens are cut into as many equal pieces, the last one shorter.
        overwrite: the backward pass writes the gradient over the logits, which nobody may read afterwards: a backward
            that needs them raises autograd's error of a modified tensor, but plain reads are not noticed. Logits that
            are a leaf are left alone.
        kernels: from :func:`build_chunked_loss`.

    Returns:
        As there: (weighted sum, unweighted sum, mean_B, norms_B or None).
    """
    _check(num_chunks, logits_BLV)
    loss_N, squared_N = _LossesOfLogits.apply(
        logits_BLV.flatten(0, 1),
        labels_BL.flatten(),
        num_chunks,
        with_gradient,
        overwrite and not logits_BLV.is_leaf,
        kernels,
    )
    weighted = (loss_N.view_as(labels_BL).sum(dim=1) * weights_B).sum()
    return _fold(weighted, loss_N, squared_N, labels_BL)


def chunked_linear_cross_entropy(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    labels_BL: Tensor,
    weights_B: Tensor,
    *,
    num_chunks: int,
    with_gradient: bool = False,
    kernels: _Kernels = _EAGER,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``weighted_cross_entropy(hidden @ weight.T, ...)`` without the logits, which exist one chunk at a time.

    The gradients with respect to ``hidden_BLD`` and ``weight_VD`` are computed in the forward pass and kept until
    the backward one: [B, L, D] in their dtype, and [V, D] in fp32, in which the chunks are added up.
    ``weights_B`` has none.

    Args:
        hidden_BLD: what the output layer gets; under autocast it and the weight are cast as a Linear would.
        weight_VD: of an output layer without bias. Under FSDP2 it must be unsharded: see :func:`loss_in_head`.
        labels_BL, weights_B, with_gradient: as in ``weighted_cross_entropy``.
        num_chunks: at least 1.

    Returns:
        (weighted sum, unweighted sum, mean_B, norms_B or None), as there.
    """
    _check(num_chunks, hidden_BLD, weight_VD)
    device = hidden_BLD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_BLD, weight_VD = hidden_BLD.to(dtype), weight_VD.to(dtype)
    weighted, loss_N, squared_N = _LossesOfHidden.apply(
        hidden_BLD.flatten(0, 1),
        weight_VD,
        labels_BL.flatten(),
        weights_B.detach().repeat_interleave(labels_BL.shape[1]),
        num_chunks,
        with_gradient,
        torch.is_grad_enabled(),
        kernels,
    )
    return _fold(weighted, loss_N, squared_N, labels_BL)


@contextmanager
def loss_in_head(
    output: nn.Linear, labels_BL: Tensor, weights_B: Tensor, *, num_chunks: int, with_gradient: bool = False
) -> Iterator[None]:
    """While open, ``output(hidden)`` returns :func:`chunked_linear_cross_entropy` of it instead of logits.

    For a model whose forward ends in that layer, as torchtitan's do: it then returns the loss's four values, and the
    weight is the unsharded one, because the loss runs inside the layer's own FSDP unit and between its hooks.

        with loss_in_head(model.output, labels, weights, num_chunks=8):
            weighted_sum, loss_sum, mean_B, norms_B = model(inputs)
    """
    if output.bias is not None:
        raise ValueError("the chunked head has no bias: use chunked_weighted_cross_entropy on this model's logits")

    def forward(hidden_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return chunked_linear_cross_entropy(
            hidden_BLD, output.weight, labels_BL, weights_B, num_chunks=num_chunks, with_gradient=with_gradient
        )

    output.forward = forward
    try:
        yield
    finally:
        del output.forward


def build_chunked_loss(
    *, num_chunks: int, compile_loss: bool, with_gradient: bool = False, backend: str = "inductor"
) -> WeightedLoss:
    """:func:`chunked_weighted_cross_entropy` of three arguments, which overwrites the logits in the backward pass.

    Args:
        compile_loss: compile the two passes over a chunk, which then need no scratch; the rest is of size [N].
    """
    kernels = _EAGER
    if compile_loss:
        compiled = partial(torch.compile, backend=backend, fullgraph=True)
        kernels = _Kernels(compiled(_row_statistics), compiled(_scaled_exponential_))
    return partial(
        chunked_weighted_cross_entropy,
        num_chunks=num_chunks,
        with_gradient=with_gradient,
        overwrite=True,
        kernels=kernels,
    )
