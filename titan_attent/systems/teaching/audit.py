"""The audit: a few scalars that describe a selection. Two collectives between rounds: an all-reduce and a maximum.

Its digest is a 64-bit hash of every choice and weight. For each selected example, the bits of its weight are multiplied
by an odd hash of its id; the digest is the sum of these products, modulo 2^64. If one weight differs in one bit, the
digest is certain to differ; if several differ, nearly certain. It is the same for every number of ranks.

Shares of sources are of their tokens where examples differ in length (tokens.py), else of their examples.

Cost: one pass over the local candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_attent.foundations.counter_rng import signed
from titan_attent.losses.records import NEVER, Records
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.radix import blocks
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.tokens import block_of, histogram

Sources = Sequence[tuple[str, int]]
"""(name, first example id) of each span of the data set, in the order of the ids; several spans may have one name."""

_MULTIPLIER = signed(0x9E3779B97F4A7C15)


def audit_scores(scores: Scores) -> dict[str, float]:
    """Statistics of the finite scores of a pool.

    Returns:
        importance_mean; importance_p99; effective_sample_size, (sum s)^2 / (N sum s^2) as a share of the finite scores.
    """
    return {
        "teacher/importance_mean": scores.metrics.mean,
        "teacher/importance_p99": scores.summary.p99,
        "teacher/effective_sample_size": scores.metrics.share,
    }


@dataclass(frozen=True)
class SelectionAudit:
    """The statistics of a selection.

    Attributes:
        scalars: loss_age (mean steps since the loss of a candidate was recorded); overlap (share of this selection that
            was in the previous one); max_weight; inclusion/NAME (selected share of a source's candidates). Sources
            without a candidate are left out, and all are if there is only one.
        num_chosen: number of selected examples.
        num_counted: number of selected examples, or of their tokens where examples differ in length.
        num_new: number of examples that were selected for the first time.
        digest: hash of the selected examples and their weights, signed 64 bits.
    """

    scalars: dict[str, float]
    num_chosen: int
    num_counted: int
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
    """Compute the audit of a selection. A collective.

    Args:
        weights: fp32 [num_local], 0 where not selected.
        records: the records of the candidates.
        last_draw: int32 [num_local], the last draw before this one that selected the candidate; ``NEVER`` for none.
        draw: number of this draw.
        step: training steps done.
        sources: the spans of the data set by source.
    """
    sharding, device = candidates.sharding, weights.device
    by_source = sources if len({name for name, _ in sources}) > 1 else ()
    starts = torch.tensor([first for _, first in by_source], dtype=torch.int64, device=device)
    tokens = None if candidates.tokens is None else candidates.tokens.local
    counts = torch.zeros(6 + (tokens is not None) + 2 * len(by_source), dtype=torch.int64, device=device)
    largest = torch.zeros((), device=device)
    for block in blocks(len(weights), device=device):
        weight, previous, loss_step = weights[block], last_draw[block], records.step[block]
        ids, chosen, of_each = candidates.ids_at(block), (weight > 0).int(), block_of(tokens, block)
        tokens_chosen = [] if of_each is None else [(of_each * chosen).sum()]
        sums = [
            -(loss_step == NEVER).sum(),  # taken off the sum of the steps, in which NEVER is -1
            loss_step.sum(),
            chosen.sum(),
            chosen.bitwise_and(previous == NEVER).sum(),
            chosen.bitwise_and_(previous == max(0, draw - 1)).sum(),
            _digest(ids, weight),
            *tokens_chosen,
        ]
        local = torch.stack(sums)
        if by_source:
            span = torch.bucketize(ids, starts, right=True) - 1
            is_chosen = weight > 0
            tokens_of_chosen = None if of_each is None else of_each[is_chosen]
            local = torch.cat(
                (
                    local,
                    histogram(span, of_each, num_bins=len(starts)),
                    histogram(span[is_chosen], tokens_of_chosen, num_bins=len(starts)),
                )
            )
        counts += local
        largest = torch.maximum(largest, weight.max())
    minus_unscored, total_step, num_chosen, num_new, num_again, digest, *span_counts = sharding.total(counts)
    num_counted = num_chosen if tokens is None else span_counts.pop(0)
    num_scored = sharding.num_examples + minus_unscored
    total_age = step * num_scored - (total_step - minus_unscored)
    scalars = {
        "teacher/loss_age": total_age / max(1, num_scored),
        "teacher/overlap": num_again / max(1, num_chosen),
        "teacher/max_weight": float(sharding.max(largest)),
    }
    return SelectionAudit(
        scalars | _inclusion(by_source, span_counts), num_chosen, num_counted, num_new, signed(digest)
    )


def _digest(ids: Tensor, weights: Tensor) -> Tensor:
    """int64 []: the sum over examples of (bits of the weight) x (odd hash of the id); a weight of 0 adds nothing."""
    bits = weights.view(torch.int32).long()
    bits += bits >> 23  # sets low bits of powers of two, too; different floats stay different
    hashes = ids * _MULTIPLIER
    hashes ^= hashes >> 32
    return hashes.mul_(_MULTIPLIER).bitwise_or_(1).mul_(bits).sum()


def _inclusion(sources: Sources, counts: list[int]) -> dict[str, float]:
    """The selected share of each source.

    Args:
        counts: the candidates of every span, then the selected ones of every span, or the tokens of both.
    """
    num_candidates: dict[str, int] = {}
    num_chosen: dict[str, int] = {}
    for (name, _), of_span, chosen in zip(sources, counts[: len(sources)], counts[len(sources) :], strict=True):
        num_candidates[name] = num_candidates.get(name, 0) + of_span
        num_chosen[name] = num_chosen.get(name, 0) + chosen
    return {f"teacher/inclusion/{name}": num_chosen[name] / num for name, num in num_candidates.items() if num}
