"""The weighted cross-entropy of cross_entropy.py in chunks of tokens, without a second copy of the logits.

Only one chunk at a time is upcast to fp32, and the gradient can overwrite the logits. So the logits themselves are the
peak memory. torch's own cross-entropy keeps the logits and a gradient of their size when it is compiled, and several
fp32 copies in addition when it is not.

Cost, for T tokens in chunks of C: 12 T bytes of row statistics in addition to the logits; 4 C V bytes of scratch memory
(eager) or none (compiled). The logits are read twice forward, and read and written once backward. No collective.

Shapes as in cross_entropy.py: T tokens, C tokens per chunk, V vocabulary, N examples.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX, WeightedLoss
from titan_attent.losses.folding import ExampleLosses, LossRule, finish


def _row_statistics(logits_CV: Tensor, squares: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Largest logit, sum of e = exp(z - largest), and with ``squares`` the sum of e^2: fp32 [C] each."""
    maximum_C = logits_CV.amax(dim=-1).float()
    e_CV = logits_CV.to(torch.float32, copy=True).sub_(maximum_C[:, None]).exp_()
    return maximum_C, e_CV.sum(dim=-1), e_CV.square_().sum(dim=-1) if squares else None


def _scaled_exponential_(logits_CV: Tensor, maximum_C: Tensor, factor_C: Tensor) -> None:
    """In place: z -> factor exp(z - maximum), computed in fp32."""
    logits_CV.copy_(logits_CV.to(torch.float32, copy=True).sub_(maximum_C[:, None]).exp_().mul_(factor_C[:, None]))


class Kernels(NamedTuple):
    """The two functions that pass over a chunk; compiled, they need no fp32 scratch memory."""

    row_statistics: Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor | None]]
    scaled_exponential_: Callable[[Tensor, Tensor, Tensor], None]


EAGER = Kernels(_row_statistics, _scaled_exponential_)


class _TokenLosses(NamedTuple):
    """The loss of each token, 0 where the label is ignored, and the statistics that the gradient needs: fp32 [T]."""

    loss_T: Tensor
    maximum_T: Tensor
    total_T: Tensor
    squared_T: Tensor | None


def _token_losses(logits_CV: Tensor, labels_C: Tensor, *, squares: bool, kernels: Kernels) -> _TokenLosses:
    maximum_C, total_C, total_squares_C = kernels.row_statistics(logits_CV, squares)
    label_logit_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0].float()
    loss_C = torch.where(labels_C != IGNORE_INDEX, total_C.log() - (label_logit_C - maximum_C), 0.0)
    squared_C = None
    if total_squares_C is not None:  # sum_v p_v^2 - 2 p_y + 1, see cross_entropy.py
        squared_C = total_squares_C / total_C.square() - 2 * (-loss_C).exp() + 1
    return _TokenLosses(loss_C, maximum_C, total_C, squared_C)


def _gradient_(logits_CV: Tensor, labels_C: Tensor, scale_C: Tensor, losses: _TokenLosses, kernels: Kernels) -> None:
    """In place: logits -> scale (softmax - onehot), 0 where the label is ignored."""
    scale_C = torch.where(labels_C != IGNORE_INDEX, scale_C, 0.0)
    kernels.scaled_exponential_(logits_CV, losses.maximum_T, scale_C / losses.total_T)
    at_label_C = torch.expm1(-losses.loss_T) * scale_C  # p_y - 1 without cancellation
    # Not scatter_, which on CPU makes an fp32 copy of a bf16 tensor.
    rows_C = torch.arange(len(labels_C), device=labels_C.device)
    logits_CV.index_put_((rows_C, labels_C.clamp(min=0)), at_label_C.to(logits_CV.dtype))


def _chunks(num_tokens: int, num_chunks: int) -> Iterator[slice]:
    size = max(1, -(-num_tokens // num_chunks))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _concatenated(chunks: list[_TokenLosses]) -> _TokenLosses:
    loss, maximum, total, squared = zip(*chunks, strict=True)
    return _TokenLosses(
        torch.cat(loss), torch.cat(maximum), torch.cat(total), None if squared[0] is None else torch.cat(squared)
    )


class _LossesOfLogits(torch.autograd.Function):
    """logits [T, V], labels [T] -> token losses fp32 [T]; squared norms fp32 [T] or None, not differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        num_chunks: int,
        squares: bool,
        overwrite: bool,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor | None]:
        losses = _concatenated(
            [
                _token_losses(logits_TV[rows], labels_T[rows], squares=squares, kernels=kernels)
                for rows in _chunks(len(labels_T), num_chunks)
            ]
        )
        ctx.num_chunks, ctx.overwrite, ctx.kernels = num_chunks, overwrite, kernels
        ctx.save_for_backward(logits_TV, labels_T, *losses[:3])
        ctx.set_materialize_grads(False)
        if losses.squared_T is not None:
            ctx.mark_non_differentiable(losses.squared_T)
        return losses.loss_T, losses.squared_T

    @staticmethod
    def backward(ctx: Any, scale_T: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None, None]:
        if scale_T is None:
            return None, None, None, None, None, None
        logits_TV, labels_T, *statistics = ctx.saved_tensors
        # detach() shares the version counter: a later backward that needs the logits raises autograd's error.
        gradient_TV = logits_TV.detach() if ctx.overwrite else logits_TV.clone()
        for rows in _chunks(len(labels_T), ctx.num_chunks):
            loss, maximum, total = (tensor[rows] for tensor in statistics)
            losses = _TokenLosses(loss, maximum, total, None)
            _gradient_(gradient_TV[rows], labels_T[rows], scale_T[rows], losses, ctx.kernels)
        return gradient_TV, None, None, None, None, None


def _check(num_chunks: int, logits: Tensor) -> None:
    if num_chunks < 1:
        raise ValueError(f"num_chunks = {num_chunks}: the loss needs at least 1 chunk of tokens")
    if isinstance(logits, DTensor):
        raise ValueError(
            "the chunked loss takes plain tensors, not DTensors: where tensor parallelism shards the vocabulary, use "
            "build_vocab_parallel_loss"
        )


def chunked_weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights_N: Tensor,
    statistics: Tensor | None = None,
    *,
    num_chunks: int,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    overwrite: bool = False,
    kernels: Kernels = EAGER,
    example_index: Tensor | None = None,
) -> ExampleLosses:
    """:func:`titan_attent.losses.cross_entropy.weighted_cross_entropy`, with one chunk of tokens in fp32 at a time.

    Args:
        logits, labels, weights_N, statistics, with_gradient, rule, example_index: as in that function.
        num_chunks: at least 1; the tokens are split into this number of equal chunks, the last one shorter.
        overwrite: the backward pass writes the gradient over the logits, so they must not be read afterwards. A
            backward that needs them raises autograd's error for modified tensors; plain reads raise no error. Logits
            that are a leaf are never overwritten.
        kernels: from :func:`build_chunked_loss`.

    ValueError as in that function, for fewer than 1 chunk, and for DTensors.
    """
    _check(num_chunks, logits)
    losses_T, squared_T = _LossesOfLogits.apply(
        logits.flatten(0, -2),
        labels.flatten(),
        num_chunks,
        with_gradient,
        overwrite and not logits.is_leaf,
        kernels,
    )
    return finish(
        losses_T,
        labels != IGNORE_INDEX,
        weights_N,
        statistics,
        squared_norms=squared_T,
        rule=rule,
        example_index=example_index,
    )


def build_chunked_loss(
    *,
    num_chunks: int,
    compile_loss: bool,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """Build :func:`chunked_weighted_cross_entropy` with fixed options; it overwrites the logits in the backward pass.

    Args:
        compile_loss: compile the two functions that pass over a chunk, which then need no scratch memory. The other
            operations work on tensors [T].
    """
    kernels = EAGER
    if compile_loss:
        compiled = partial(torch.compile, backend=backend, fullgraph=True)
        kernels = Kernels(compiled(_row_statistics), compiled(_scaled_exponential_))
    return partial(
        chunked_weighted_cross_entropy,
        num_chunks=num_chunks,
        with_gradient=with_gradient,
        rule=rule,
        overwrite=True,
        kernels=kernels,
    )
