"""The audit: what a selection looks like, as a few scalars. Collectives between rounds: an all-reduce and a maximum.

Its digest is a 64-bit hash of every choice and weight. For each chosen example the bits of its weight
are multiplied by an odd number, a hash of its place; the digest is the sum of these products, modulo 2^64. Where one
weight differs in one bit, the digest differs for sure, and where several differ, as good as for sure. It is the same
for every number of ranks.

Cost: one pass over the local candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_attent.foundations.counter_rng import signed
from titan_attent.losses.records import Records
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.radix import blocks, is_positive
from titan_attent.systems.teaching.statistics import Scores

Sources = Sequence[tuple[str, int]]
"""(name, first example id) of each stretch of the data set, in the order of the ids; a name may come again."""

_MULTIPLIER = signed(0x9E3779B97F4A7C15)


def audit_scores(scores: Scores) -> dict[str, float]:
    """Statistics of the finite scores of a pool.

    Returns:
        importance_mean; importance_p99; effective_sample_size, (sum s)^2 / (N sum s^2) as a share of the scored.
    """
    return {
        "teacher/importance_mean": scores.metrics.mean,
        "teacher/importance_p99": scores.summary.p99,
        "teacher/effective_sample_size": scores.metrics.share,
    }


@dataclass(frozen=True)
class SelectionAudit:
    """What was chosen of a pool.

    Attributes:
        audit: loss_age (mean steps since the loss of a candidate was seen); overlap (share of this selection that was
            in the one before); max_weight; inclusion/NAME (share of a source's candidates that was chosen; sources
            without a candidate are left out, and all where there is but one).
        num_new: examples that were chosen for the first time.
        digest: of the choices and their weights, signed 64 bits.
    """

    audit: dict[str, float]
    num_new: int
    digest: int


def audit_selection(
    candidates: Candidates,
    *,
    weights: Tensor,
    records: Records,
    last_draw: Tensor,
    draw: int,
    step: int,
    sources: Sources = (),
) -> SelectionAudit:
    """What was chosen of the candidates. A collective.

    Args:
        weights: fp32 [num_local], 0 where not chosen.
        records: of the candidates.
        last_draw: int32 [num_local], the draw that chose a candidate last before this one; ``NEVER`` for none.
        draw: number of this draw.
        step: training steps done.
        sources: of the data set.
    """
    sharding, device = candidates.sharding, weights.device
    by_source = sources if len({name for name, _ in sources}) > 1 else ()
    starts = torch.tensor([first for _, first in by_source], dtype=torch.int64, device=device)
    counts = torch.zeros(6 + 2 * len(by_source), dtype=torch.int64, device=device)
    largest = torch.zeros((), device=device)
    for block in blocks(len(weights), device=device):
        weight, before, seen, ids = weights[block], last_draw[block], records.step[block], candidates.ids_at(block)
        chosen = is_positive(weight)
        parts = [
            (seen >> 31).sum(),  # NEVER is -1, and the only negative one
            seen.sum(),
            chosen.sum(),
            (before >> 31).bitwise_and_(chosen).sum(),  # NEVER
            chosen.bitwise_and_(before == max(0, draw - 1)).sum(),
            _digest(ids, weight),
        ]
        here = torch.stack(parts)
        if by_source:
            source = torch.bucketize(ids, starts, right=True) - 1
            both = [torch.bincount(stretch, minlength=len(starts)) for stretch in (source, source[weight > 0])]
            here = torch.cat((here, *both))
        counts += here
        largest = torch.maximum(largest, weight.max())
    minus_unknown, total_seen, num_chosen, num_new, num_again, digest, *of_sources = sharding.total(counts)
    num_known = sharding.num_examples + minus_unknown
    total_age = step * num_known - (total_seen - minus_unknown)
    audit = {
        "teacher/loss_age": total_age / max(1, num_known),
        "teacher/overlap": num_again / max(1, num_chosen),
        "teacher/max_weight": float(sharding.max(largest)),
    }
    return SelectionAudit(audit | _inclusion(by_source, of_sources), num_new, signed(digest))


def _digest(ids: Tensor, weights: Tensor) -> Tensor:
    """int64 []: the sum over examples of (bits of the weight) x (odd hash of the id); 0 counts nothing."""
    bits = weights.view(torch.int32).long()
    bits += bits >> 23  # no two floats are equal after it; powers of two have set low bits, too
    places = ids * _MULTIPLIER
    places ^= places >> 32
    return places.mul_(_MULTIPLIER).bitwise_or_(1).mul_(bits).sum()


def _inclusion(sources: Sources, counts: list[int]) -> dict[str, float]:
    """``counts``: of each stretch's candidates, then of the chosen ones of each."""
    candidates: dict[str, int] = {}
    chosen: dict[str, int] = {}
    for (name, _), all_of_it, taken in zip(sources, counts[: len(sources)], counts[len(sources) :], strict=True):
        candidates[name] = candidates.get(name, 0) + all_of_it
        chosen[name] = chosen.get(name, 0) + taken
    return {f"teacher/inclusion/{name}": chosen[name] / count for name, count in candidates.items() if count}
