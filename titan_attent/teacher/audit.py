"""The audit: what a selection looks like, as a few scalars. Collectives between rounds, a few small all-reduces."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_attent.loss_records import NEVER, Records
from titan_attent.sharding import ExampleSharding
from titan_attent.teacher.importance import effective_share, fixed_point_sums, kth_largest

Sources = Sequence[tuple[str, int]]
"""(name, first example id) of each stretch of the data set, in the order of the ids; a name may come again."""


def audit_scores(scores: Tensor, *, sharding: ExampleSharding) -> dict[str, float]:
    """Statistics of the finite scores fp32 [num_local] of a pool.

    Returns:
        importance_mean; importance_p99; effective_sample_size, (sum s)^2 / (N sum s^2) as a share of the scored.
    """
    finite = torch.isfinite(scores)
    total, _, num_finite = fixed_point_sums(torch.where(finite, scores, 0.0), finite, sharding=sharding)
    p99 = kth_largest(scores, lambda n: max(1, n // 100), where=finite, sharding=sharding)
    return {
        "teacher/importance_mean": total / max(1, num_finite),
        "teacher/importance_p99": p99 or 0.0,
        "teacher/effective_sample_size": effective_share(scores, sharding=sharding),
    }


def audit_choice(
    *, weights: Tensor, records: Records, last_draw: Tensor, draw: int, step: int
) -> tuple[dict[str, float], int]:
    """What was chosen of a pool.

    Args:
        weights: fp32 [num_local], 0 where not chosen.
        records: of the candidates.
        last_draw: int32 [num_local], the draw that chose a candidate last before this one; ``NEVER`` for none.
        draw: number of this draw.
        step: training steps done.

    Returns:
        loss_age (mean steps since the loss of a candidate was seen); overlap (share of this selection that was in the
        one before); max_weight; and the number of examples that were chosen for the first time.
    """
    sharding, chosen, known = records.sharding, weights > 0, records.step != NEVER
    again, newly = chosen & (last_draw == draw - 1) & (last_draw != NEVER), chosen & (last_draw == NEVER)
    age = torch.where(known, step - records.step, 0).long().sum()
    parts = [part.sum() for part in (known, chosen, again, newly)]
    num_known, num_chosen, num_again, num_newly, total_age = sharding.sum(torch.stack([*parts, age])).tolist()
    largest = weights.max() if weights.numel() else weights.new_zeros(())
    return {
        "teacher/loss_age": total_age / max(1, num_known),
        "teacher/overlap": num_again / max(1, num_chosen),
        "teacher/max_weight": float(sharding.max(largest.clone())),
    }, num_newly


def audit_sources(sources: Sources, *, weights: Tensor, ids: Tensor, sharding: ExampleSharding) -> dict[str, float]:
    """Share of each source's candidates that was chosen; sources without a candidate are left out.

    Args:
        weights: fp32 [num_local], 0 where not chosen.
        ids: int64 [num_local], the candidates.
    """
    starts = torch.tensor([first for _, first in sources], dtype=torch.int64, device=ids.device)
    stretch = torch.bucketize(ids, starts, right=True) - 1
    counts = torch.stack([torch.bincount(stretch[kept], minlength=len(sources)) for kept in (ids >= 0, weights > 0)])
    candidates: dict[str, int] = {}
    chosen: dict[str, int] = {}
    for (name, _), all_of_it, taken in zip(sources, *sharding.sum(counts).tolist(), strict=True):
        candidates[name] = candidates.get(name, 0) + all_of_it
        chosen[name] = chosen.get(name, 0) + taken
    return {f"teacher/inclusion/{name}": chosen[name] / count for name, count in candidates.items() if count}
