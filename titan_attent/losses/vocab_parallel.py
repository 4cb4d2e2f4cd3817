"""The loss per example where an example is sharded over ranks: its vocabulary by TP, its sequence by CP.

With tensor parallelism and torchtitan's loss parallel, each rank has the logits of V / ranks tokens of the vocabulary.
No tensor of size V is gathered. There is one all-reduce MAX of the largest logit, and one all-reduce SUM of sum exp(z),
the label's logit and, for the functional gradient, sum exp(2 z). The backward softmax(z) - onehot(y) is local. The
scheme is that of Megatron-LM (arXiv 1909.08053, section 3); the third sum is added here.

Context parallelism shards the tokens of an example. The scalar to differentiate is local, as FSDP sums the gradients.
The means of an example come from the sums and counts of all ranks.

Cost per microbatch: with TP, 4 to 16 bytes per token on the wire in two collectives, and the backward recomputes the
softmax instead of keeping it. With CP, one all-reduce of 8 or 12 bytes per example. No host sync.

Shapes as in cross_entropy.py: T tokens, N examples, V vocabulary; v: this rank's shard of V.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives  # traceable, unlike torch.distributed's own
from torch.distributed.tensor import DTensor, Shard

from titan_attent.losses.cross_entropy import IGNORE_INDEX, WeightedLoss
from titan_attent.losses.folding import ExampleLosses, LossRule, finish


def _all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x, op, group))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """(logits_Tv, labels_T, id of the first column, group, with_gradient) -> token losses and squared norms, fp32 [T].

    The norms are zeros without ``with_gradient``, and never differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_Tv: Tensor, labels_T: Tensor, first: int, group: ProcessGroup, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        z_Tv = logits_Tv.float()
        largest_T = _all_reduce(z_Tv.amax(dim=-1), "max", group)
        z_Tv = z_Tv - largest_T[:, None]
        column_T = labels_T - first
        local_T = (column_T >= 0) & (column_T < z_Tv.shape[-1]) & (labels_T != IGNORE_INDEX)
        column_T = torch.where(local_T, column_T, 0)
        sums = [z_Tv.exp().sum(dim=-1), torch.where(local_T, z_Tv.gather(-1, column_T[:, None])[:, 0], 0.0)]
        if with_gradient:
            sums.append((2 * z_Tv).exp().sum(dim=-1))
        sum_exp_T, label_z_T, *sum_squares_T = _all_reduce(torch.stack(sums), "sum", group)
        log_sum_T = sum_exp_T.log()
        valid_T = labels_T != IGNORE_INDEX
        token_loss_T = torch.where(valid_T, log_sum_T - label_z_T, 0.0)
        squared_T = torch.zeros_like(token_loss_T)
        if with_gradient:  # sum p^2 - 2 p_y + 1
            squared_T = sum_squares_T[0] / sum_exp_T.square() - 2 * (-token_loss_T).exp() + 1
            squared_T = torch.where(valid_T, squared_T.clamp(min=0.0), 0.0)
        ctx.save_for_backward(logits_Tv, largest_T + log_sum_T, column_T, local_T, valid_T)
        ctx.mark_non_differentiable(squared_T)
        return token_loss_T, squared_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_Tv, log_sum_T, column_T, local_T, valid_T = ctx.saved_tensors
        p_Tv = (logits_Tv.float() - log_sum_T[:, None]).exp()
        onehot_T = local_T.to(p_Tv.dtype)
        p_Tv = p_Tv.scatter_add(-1, column_T[:, None], -onehot_T[:, None])
        grad_Tv = p_Tv * torch.where(valid_T, grads[0], 0.0)[:, None]
        return grad_Tv.to(logits_Tv.dtype), None, None, None, None


def _weighted_cross_entropy(
    logits_v: Tensor,
    labels: Tensor,
    weights_N: Tensor,
    statistics: Tensor | None,
    first: int,
    group: ProcessGroup,
    with_gradient: bool,
    rule: LossRule | None,
    example_index: Tensor | None,
) -> ExampleLosses:
    losses_T, squared_T = _VocabParallelCrossEntropy.apply(
        logits_v.flatten(0, -2), labels.flatten(), first, group, with_gradient
    )
    return finish(
        losses_T,
        labels != IGNORE_INDEX,
        weights_N,
        statistics,
        squared_norms=squared_T if with_gradient else None,
        rule=rule,
        example_index=example_index,
    )


def build_vocab_parallel_loss(
    *,
    compile_loss: bool,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """:func:`titan_attent.losses.cross_entropy.build_weighted_loss` for logits that are sharded along the vocabulary.

    The loss takes logits as a DTensor of one mesh dimension, placed ``Shard(-1)``. Labels, weights, index and results
    are plain tensors, equal on all ranks of that mesh. The loss is a collective.
    """
    local_loss = _weighted_cross_entropy
    if compile_loss:
        local_loss = torch.compile(local_loss, backend=backend, fullgraph=True)
    return partial(_vocab_parallel_loss, local_loss, with_gradient, rule)


def _vocab_parallel_loss(
    local_loss: Any,
    with_gradient: bool,
    rule: LossRule | None,
    logits: Tensor,
    labels: Tensor,
    weights_N: Tensor,
    statistics: Tensor | None = None,
    *,
    example_index: Tensor | None = None,
) -> ExampleLosses:
    if not isinstance(logits, DTensor) or not (
        logits.device_mesh.ndim == 1 and logits.placements[0] in (Shard(-1), Shard(logits.ndim - 1))
    ):
        raise ValueError(
            f"the loss over a sharded vocabulary needs logits placed Shard(-1) on one mesh dimension, not "
            f"{getattr(logits, 'placements', 'a plain tensor')}: set parallelism.disable_loss_parallel for a model "
            "whose output is not sharded"
        )
    mesh = logits.device_mesh
    # Shard splits as torch.chunk does: ceil(V / ranks) columns per rank, fewer on the last.
    first = mesh.get_local_rank() * -(-logits.shape[-1] // mesh.size())
    arguments = (logits.to_local(), labels, weights_N, statistics)
    return local_loss(*arguments, first, mesh.get_group(), with_gradient, rule, example_index)


def whole_example_means(
    losses_N: Tensor, norms_N: Tensor | None, counts_N: Tensor, *, group: ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """The means of examples whose tokens are sharded over the ranks of ``group``, from each rank's means.

    Args:
        losses_N: fp32 [N], mean nats over this rank's valid tokens.
        norms_N: fp32 [N], the functional gradient's norm over them (the root of a mean square), or None.
        counts_N: fp32 [N], the number of this rank's valid tokens; may be 0.

    Returns:
        Losses and norms over all valid tokens, equal on all ranks; 0 for an example without valid tokens. A collective.
    """
    sums = [counts_N, losses_N * counts_N]
    if norms_N is not None:
        sums.append(norms_N.square() * counts_N)
    count_N, loss_N, *square_N = _all_reduce(torch.stack(sums), "sum", group)
    count_N = count_N.clamp(min=1.0)
    return loss_N / count_N, (square_N[0] / count_N).sqrt() if square_N else None
