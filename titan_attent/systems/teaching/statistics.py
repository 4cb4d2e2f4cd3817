"""What is known of a pool's scores, found once a draw: order statistics, sums, shares. Everything reads it from here.

    summary    largest, smallest, the 1% at each end (one radix descent: 4 all-reduces)
    measures   mean and effective sample sizes (one all-reduce)

The effective sample size of m scores is (sum s)^2 / (m sum s^2) as a share of m: 1 when all are equal, n / m when n of
them are equal and the others 0. Negative scores count as 0 there.

Sums of floats depend on their order, hence on the number of ranks; these are of integers, the values in 2^-15 of the
largest absolute one: exact for any number of examples, and close enough for a mean or a share.

Cost a rank: four passes over the local scores in blocks, and no memory to speak of.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import blocks, largest_keys, ordered_keys, score_of_key

QUANTILE = 0.01
"""The share of the pool, by importance, that the quarantine watches."""

_UNITS = 1 << 15


@dataclass(frozen=True)
class ScoreSummary:
    """Order statistics of the finite ones among the scores of all ranks; 0 where there is none.

    Attributes:
        num_finite, num_unseen, num_broken: how many scores are finite, +inf, and -inf.
        largest, smallest: of the finite ones.
        high, low: what 1% of them lie above and below, so that one outlier does not set the scale; the ends themselves
            of fewer than 100.
        quarantine_threshold: the least of the top ``QUANTILE``.
        p99: the least of the top 1%, for the audit.
    """

    num_finite: int
    num_unseen: int
    num_broken: int
    largest: float = 0.0
    high: float = 0.0
    quarantine_threshold: float = 0.0
    p99: float = 0.0
    low: float = 0.0
    smallest: float = 0.0

    def clipped(self, scores: Tensor) -> Tensor:
        """fp32 scores, any of them -> between ``low`` and ``high``; infinities keep their meaning."""
        inside = scores.clamp(self.low, self.high)
        return torch.where(scores.isinf(), scores, inside) if self.num_unseen or self.num_broken else inside


def summarize(scores: Tensor, *, sharding: ExampleSharding) -> ScoreSummary:
    """fp32 [num_local] scores without NaN -> their summary over all ranks. A collective."""
    infinite = [0, 0]

    def places(num_unseen: int, num_broken: int) -> list[int]:
        infinite[:] = num_unseen, num_broken
        n = sharding.num_examples - num_unseen - num_broken
        from_the_top = [1, 1 + n // 100, max(1, int(QUANTILE * n)), max(1, n // 100), n - n // 100, n]
        return [num_unseen + place for place in from_the_top] if n else []

    found = largest_keys(lambda block: ordered_keys(scores[block]), places, sharding=sharding, device=scores.device)
    return ScoreSummary(
        sharding.num_examples - sum(infinite), *infinite, *(score_of_key(statistic.key) for statistic in found)
    )


@dataclass(frozen=True)
class Metrics:
    """Sums over the finite scores of all ranks.

    Attributes:
        mean: of them; 0 where there is none.
        share: their effective sample size.
        clipped_share: the same of the clipped scores, for the adaptive ratio.
        shifted_share: the same of the clipped scores, counted from the lowest where that is negative. An excess loss
            below 0 says that the learner has overtaken the reference there, not that the example counts for nothing:
            where most are, what is left above 0 is no measure of how many examples would rule a selection.
    """

    mean: float
    share: float
    clipped_share: float
    shifted_share: float


class Scores:
    """The scores of a pool. What is known of them is found when it is first asked for: a collective, on all ranks.

    Args:
        values: fp32 [num_local], without NaN; +inf comes first, -inf last.
    """

    def __init__(self, values: Tensor, *, sharding: ExampleSharding):
        self.values, self.sharding = values, sharding

    @cached_property
    def summary(self) -> ScoreSummary:
        return summarize(self.values, sharding=self.sharding)

    @cached_property
    def metrics(self) -> Metrics:
        return self.compute_metrics(torch.zeros(0, dtype=torch.int64, device=self.values.device))[0]

    def compute_metrics(self, counts: Tensor) -> tuple[Metrics, list[int]]:
        """Find the measures; the totals over all ranks of ``counts``, int64 [n], come with the same all-reduce."""
        self.metrics, totals = compute_metrics(self.values, self.summary, sharding=self.sharding, counts=counts)
        return self.metrics, totals

    @cached_property
    def has_unseen(self) -> bool:
        """Whether any may be +inf."""
        return self.summary.num_unseen > 0

    def num_below(self, edges: Tensor) -> list[int]:
        """fp32 [n], sorted -> how many scores of all ranks are below each. A collective of 16 bytes an edge."""
        here = torch.zeros(len(edges) + 1, dtype=torch.int64, device=edges.device)
        for block in blocks(len(self.values), device=self.values.device):
            places = torch.bucketize(self.values[block], edges, right=True)  # edges that are not above it
            here += torch.bincount(places, minlength=len(here))
        return list(itertools.accumulate(self.sharding.total(here)[:-1]))

    def without(self, excluded: Tensor) -> "Scores":
        """The scores where bool [num_local] ``excluded`` come last; in place, so that these are lost."""
        left = Scores(self.values.masked_fill_(excluded, float("-inf")), sharding=self.sharding)
        left.has_unseen = self.has_unseen
        return left


_Kind = tuple[float, float, float]
"""(low, high, shift): the values s.clamp(low, high) + shift of the scores s."""


def compute_metrics(
    scores: Tensor, summary: ScoreSummary, *, sharding: ExampleSharding, counts: Tensor
) -> tuple[Metrics, list[int]]:
    """The measures of fp32 [num_local] scores, and the totals of ``counts``, int64 [n], which ride along.

    A collective, one all-reduce.
    """
    kinds: list[_Kind] = [
        (summary.smallest, summary.largest, 0.0),
        (max(0.0, summary.low), max(0.0, summary.high), 0.0),
    ]
    share, ruling = 0, 1  # the same sums, unless there are negative scores
    if summary.smallest < 0:
        share = len(kinds)
        kinds.append((0.0, max(0.0, summary.largest), 0.0))
    if summary.low < 0:
        ruling = len(kinds)
        kinds.append((summary.low, summary.high, -summary.low))
    sums = [_local_sums(scores, kind, summary) for kind in kinds]
    totals = sharding.total(torch.cat([local for local, _ in sums] + [counts]))
    found = [_without_infinite(totals[3 * i : 3 * i + 3], ends, summary) for i, (_, ends) in enumerate(sums)]
    wanted = [found[share], found[1], found[ruling]]
    shares = [total * total / (summary.num_finite * squares) if squares > 0 else 1.0 for total, squares in wanted]
    return Metrics(found[0][0] / max(1, summary.num_finite), *shares), totals[3 * len(kinds) :]


@dataclass(frozen=True)
class _Ends:
    """What an infinite score was counted as, in units, and the unit."""

    low: int
    high: int
    scale: float


def _local_sums(scores: Tensor, kind: _Kind, summary: ScoreSummary) -> tuple[Tensor, _Ends]:
    """int64 [3]: sum and sum of squares of this rank's values in units, the squares as two halves of 31 bits.

    Infinite scores count as the ends between which values are clipped.
    """
    low, high, shift = kind
    ends = torch.tensor([low, high], dtype=torch.float32) + shift
    scale = float(ends.abs().max()) / _UNITS
    sums = torch.zeros(3, dtype=torch.int64, device=scores.device)
    if scale == 0.0:
        return sums, _Ends(0, 0, 0.0)
    for block in blocks(len(scores), device=scores.device):
        values = scores[block].clamp(low, high)
        units = _units(values.add_(shift) if shift else values, scale)
        # Exact: whole numbers, and a block's squares sum up to less than 2^53.
        total, squares = units.sum().long(), torch.dot(units, units).long()
        sums += torch.stack((total, squares >> 31, squares & 0x7FFFFFFF))
    first, last = _units(ends.to(scores.device), scale).long().tolist()
    return sums, _Ends(first, last, scale)


def _units(values: Tensor, scale: float) -> Tensor:
    return values.double().div_(scale).round_()


def _without_infinite(sums: list[int], ends: _Ends, summary: ScoreSummary) -> tuple[float, float]:
    """Sum and sum of squares of the finite values."""
    total = sums[0] - summary.num_broken * ends.low - summary.num_unseen * ends.high
    squares = (sums[1] << 31) + sums[2] - summary.num_broken * ends.low**2 - summary.num_unseen * ends.high**2
    return total * ends.scale, squares * ends.scale * ends.scale
