"""The output layer and its loss in one: only the logits of one chunk of tokens exist at a time, never a whole batch's.

A chunk's logits, its loss and its gradients with respect to the hidden states and the layer's weight are computed in
the forward pass, chunk after chunk. The idea is known from Liger Kernel (arXiv 2410.10989) and torchtune; this is an
implementation of its own.

Cost, for N = B L tokens in chunks of C: 2 C V bytes of bf16 logits (and 4 C V of scratch when not compiled), the
gradients [N, D] and, in fp32, [V, D], and one product [V, D] a chunk: choose chunks of a thousand tokens or more. The
matrix products are the same as the plain layer's. No collective.

Shapes: B examples, L tokens, N = B L, C tokens of a chunk, V vocabulary, D width of the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from titan_attent.losses.chunked import (
    EAGER,
    Kernels,
    check,
    chunks,
    concatenated,
    gradient_,
    per_example,
    token_losses,
)


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
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        need_hidden, need_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight_VD: Tensor | None = None
        parts = []
        for rows in chunks(len(labels_N), num_chunks):
            hidden_CD, labels_C = hidden_ND[rows], labels_N[rows]
            logits_CV = hidden_CD @ weight_VD.t()
            parts.append(token_losses(logits_CV, labels_C, squares=squares, kernels=kernels))
            if need_hidden or need_weight:
                gradient_(logits_CV, labels_C, weights_N[rows], parts[-1], kernels)
            if grad_hidden_ND is not None:
                torch.mm(logits_CV, weight_VD, out=grad_hidden_ND[rows])
            if need_weight:
                part_VD = logits_CV.t() @ hidden_CD
                grad_weight_VD = part_VD.float() if grad_weight_VD is None else grad_weight_VD.add_(part_VD)
                del part_VD
            del logits_CV  # before the next chunk's
        losses = concatenated(parts)
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


def chunked_linear_cross_entropy(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    labels_BL: Tensor,
    weights_B: Tensor,
    *,
    num_chunks: int,
    with_gradient: bool = False,
    kernels: Kernels = EAGER,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``weighted_cross_entropy(hidden @ weight.T, ...)`` without the logits, which exist one chunk at a time.

    The gradients with respect to ``hidden_BLD`` and ``weight_VD`` are computed in the forward pass and kept until
    the backward one: [B, L, D] in their dtype, and [V, D] in fp32, in which the chunks are added up.
    ``weights_B`` has none, and must be known before the loss is: weights that follow it need the logits' function.

    Args:
        hidden_BLD: what the output layer gets; under autocast it and the weight are cast as a Linear would.
        weight_VD: of an output layer without bias. Under FSDP2 it must be unsharded: see :func:`loss_in_head`.
        labels_BL, weights_B, with_gradient: as in ``weighted_cross_entropy``.
        num_chunks: at least 1.

    Returns:
        (weighted sum, unweighted sum, mean_B, norms_B or None), as there.
    """
    check(num_chunks, hidden_BLD, weight_VD)
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
    return weighted, *per_example(loss_N, squared_N, labels_BL)


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
