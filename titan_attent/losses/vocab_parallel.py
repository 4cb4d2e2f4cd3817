"""The per-example loss where no rank sees the whole example: vocabulary cut by TP, sequence cut by CP.

Tensor parallelism with torchtitan's loss parallel leaves each rank the logits of V / ranks tokens of the vocabulary.
Nothing of size V is gathered: one all-reduce MAX of the largest logit, one SUM of sum exp(z), the label's logit and,
for the functional gradient, sum exp(2 z). The backward softmax(z) - onehot(y) is local. (The scheme is Megatron-LM's,
arXiv 1909.08053, section 3; the norm's third sum is ours.)

Context parallelism cuts the tokens of an example: the scalar to differentiate is local (FSDP sums the gradients), and
the means of an example come from sums and counts of all its parts.

Cost a microbatch: TP 4 to 16 bytes a token on the wire in two collectives, the backward recomputes the softmax instead
of keeping it; CP one all-reduce of 8 or 12 bytes an example. No host sync.

Shapes as in cross_entropy.py: B examples, L tokens, V vocabulary; N = B L; v: this rank's part of V.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives  # traceable, unlike torch.distributed's own
from torch.distributed.tensor import DTensor, Shard

from titan_attent.losses.cross_entropy import IGNORE_INDEX, WeightedLoss
from titan_attent.losses.window import capped_linear_weights


def _all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x, op, group))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """(logits_Nv, labels_N, id of the first column, group, with_gradient) -> token losses and squared norms, fp32 [N].

    The norms are zeros without ``with_gradient``, and never differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_Nv: Tensor, labels_N: Tensor, first: int, group: ProcessGroup, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        z_Nv = logits_Nv.float()
        largest_N = _all_reduce(z_Nv.amax(dim=-1), "max", group)
        z_Nv = z_Nv - largest_N[:, None]
        column_N = labels_N - first
        mine_N = (column_N >= 0) & (column_N < z_Nv.shape[-1]) & (labels_N != IGNORE_INDEX)
        column_N = torch.where(mine_N, column_N, 0)
        sums = [z_Nv.exp().sum(dim=-1), torch.where(mine_N, z_Nv.gather(-1, column_N[:, None])[:, 0], 0.0)]
        if with_gradient:
            sums.append((2 * z_Nv).exp().sum(dim=-1))
        sum_exp_N, label_z_N, *rest = _all_reduce(torch.stack(sums), "sum", group)
        log_sum_N = sum_exp_N.log()
        valid_N = labels_N != IGNORE_INDEX
        token_loss_N = torch.where(valid_N, log_sum_N - label_z_N, 0.0)
        squared_N = torch.zeros_like(token_loss_N)
        if with_gradient:  # sum p^2 - 2 p_y + 1
            squared_N = rest[0] / sum_exp_N.square() - 2 * (-token_loss_N).exp() + 1
            squared_N = torch.where(valid_N, squared_N.clamp(min=0.0), 0.0)
        ctx.save_for_backward(logits_Nv, largest_N + log_sum_N, column_N, mine_N, valid_N)
        ctx.mark_non_differentiable(squared_N)
        return token_loss_N, squared_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_Nv, log_sum_N, column_N, mine_N, valid_N = ctx.saved_tensors
        p_Nv = (logits_Nv.float() - log_sum_N[:, None]).exp()
        onehot_N = mine_N.to(p_Nv.dtype)
        p_Nv = p_Nv.scatter_add(-1, column_N[:, None], -onehot_N[:, None])
        grad_Nv = p_Nv * torch.where(valid_N, grads[0], 0.0)[:, None]
        return grad_Nv.to(logits_Nv.dtype), None, None, None, None


def _weighted_cross_entropy(
    logits_BLv: Tensor,
    labels_BL: Tensor,
    weights_B: Tensor,
    statistics: Tensor | None,
    first: int,
    group: ProcessGroup,
    with_gradient: bool,
    temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    token_loss, squared = _VocabParallelCrossEntropy.apply(
        logits_BLv.flatten(0, 1), labels_BL.flatten(), first, group, with_gradient
    )
    sums_B = token_loss.view_as(labels_BL).sum(dim=1)
    counts_B = (labels_BL != IGNORE_INDEX).sum(dim=1, dtype=torch.float32).clamp(min=1.0)
    norms_B = (squared.view_as(labels_BL).sum(dim=1) / counts_B).sqrt() if with_gradient else None
    detached_B = sums_B.detach()
    mean_B = detached_B / counts_B
    if temperature is not None:
        assert statistics is not None
        weights_B = weights_B * capped_linear_weights(mean_B, statistics, temperature=temperature)
    return (sums_B * weights_B).sum(), detached_B.sum(), mean_B, norms_B


def build_vocab_parallel_loss(
    *,
    compile_loss: bool,
    with_gradient: bool = False,
    temperature: float | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """:func:`titan_attent.losses.cross_entropy.build_weighted_loss` for logits that are cut along the vocabulary.

    The result takes a DTensor [B, L, V] of one mesh dimension, placed ``Shard(-1)``, and plain labels and weights,
    equal on all ranks of it; it returns what ``weighted_cross_entropy`` does, as plain tensors, equal on all ranks. A
    collective.
    """
    local_loss = _weighted_cross_entropy
    if compile_loss:
        local_loss = torch.compile(local_loss, backend=backend, fullgraph=True)
    return partial(_vocab_parallel_loss, local_loss, with_gradient, temperature)


def _vocab_parallel_loss(
    local_loss: Any,
    with_gradient: bool,
    temperature: float | None,
    logits_BLV: Tensor,
    labels_BL: Tensor,
    weights_B: Tensor,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if not isinstance(logits_BLV, DTensor) or not (
        logits_BLV.device_mesh.ndim == 1 and logits_BLV.placements[0] in (Shard(-1), Shard(logits_BLV.ndim - 1))
    ):
        raise ValueError(
            f"the loss over a cut vocabulary needs logits placed Shard(-1) on one mesh dimension, not "
            f"{getattr(logits_BLV, 'placements', 'a plain tensor')}: set parallelism.disable_loss_parallel for a model "
            "whose output is whole"
        )
    mesh = logits_BLV.device_mesh
    # Shard cuts as torch.chunk does: all parts but the last are ceil(V / ranks) wide.
    first = mesh.get_local_rank() * -(-logits_BLV.shape[-1] // mesh.size())
    return local_loss(
        *(logits_BLV.to_local(), labels_BL, weights_B, statistics, first, mesh.get_group(), with_gradient, temperature)
    )


def whole_example_means(
    losses_B: Tensor, norms_B: Tensor | None, counts_B: Tensor, *, group: ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """Means of examples whose tokens are spread over the ranks of ``group``, from the means over each rank's tokens.

    Args:
        losses_B: fp32 [B], mean nats over this rank's valid tokens.
        norms_B: fp32 [B], the functional gradient's norm over them (root of a mean square), or None.
        counts_B: fp32 [B], the number of this rank's valid tokens; may be 0.

    Returns:
        The same two over all valid tokens, equal on all ranks; 0 for an example without any. A collective.
    """
    sums = [counts_B, losses_B * counts_B]
    if norms_B is not None:
        sums.append(norms_B.square() * counts_B)
    count_B, loss_B, *square_B = _all_reduce(torch.stack(sums), "sum", group)
    count_B = count_B.clamp(min=1.0)
    return loss_B / count_B, (square_B[0] / count_B).sqrt() if square_B else None


def valid_counts(labels_BL: Tensor) -> Tensor:
    """fp32 [B], valid tokens of each row."""
    return (labels_BL != IGNORE_INDEX).sum(dim=1, dtype=torch.float32)
