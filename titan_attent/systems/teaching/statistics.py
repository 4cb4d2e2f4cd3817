"""Statistics of a pool's scores, computed once per draw: order statistics, sums, shares. All other modules read them
here.

    summary    largest, smallest, the 1% at each end (one radix descent: 4 all-reduces)
    metrics    mean and effective sample sizes (one all-reduce)

Where examples differ in length (tokens.py), the summary counts examples and the metrics count tokens: each score counts
as often as its example has tokens.

The effective sample size of m scores is (sum s)^2 / (m sum s^2), as a share of m. It is 1 when all are equal, and n / m
when n of them are equal and the others 0. Negative scores count as 0.

Sums of floats depend on their order, hence on the number of ranks. These sums are of integers instead, in units of
2^-15 of the largest absolute score. They are exact for any number of examples, and precise enough for a mean or a
share.

Cost per rank: four passes over the local scores in blocks, and negligible memory.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import blocks, largest_keys, ordered_keys, score_of_key
from titan_attent.systems.teaching.tokens import Below, Tokens, block_of, histogram

QUANTILE = 0.01
"""The share of the pool with the largest importances; the quarantine counts selections of these examples only."""

_UNITS = 1 << 15


@dataclass(frozen=True)
class ScoreSummary:
    """Order statistics of the finite scores of all ranks; 0 if there are none.

    Attributes:
        num_finite, num_unseen, num_broken: number of scores that are finite, +inf, and -inf.
        largest, smallest: the largest and the smallest finite score.
        high, low: 1% of the finite scores lie above ``high`` and 1% below ``low``, so that one outlier does not set the
            scale. With fewer than 100 finite scores they are the largest and the smallest.
        quarantine_threshold: the smallest score of the top ``QUANTILE``.
        p99: the smallest score of the top 1%, for the audit.
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
        """Clip fp32 scores to [``low``, ``high``]; infinities stay infinite."""
        inside = scores.clamp(self.low, self.high)
        return torch.where(scores.isinf(), scores, inside) if self.num_unseen or self.num_broken else inside


def summarize(scores: Tensor, *, sharding: ExampleSharding) -> ScoreSummary:
    """fp32 [num_local] scores without NaN -> their summary over all ranks. A collective."""
    num_infinite = [0, 0]

    def ks_of(num_unseen: int, num_broken: int) -> list[int]:
        num_infinite[:] = num_unseen, num_broken
        n = sharding.num_examples - num_unseen - num_broken
        ks = [1, 1 + n // 100, max(1, int(QUANTILE * n)), max(1, n // 100), n - n // 100, n]
        return [num_unseen + k for k in ks] if n else []

    largest = largest_keys(lambda block: ordered_keys(scores[block]), ks_of, sharding=sharding, device=scores.device)
    return ScoreSummary(
        sharding.num_examples - sum(num_infinite), *num_infinite, *(score_of_key(each.key) for each in largest)
    )


@dataclass(frozen=True)
class Metrics:
    """Mean and effective sample sizes of the finite scores of all ranks, per token where examples differ in length.

    Attributes:
        mean: the mean; 0 if there are none.
        share: the effective sample size.
        clipped_share: the effective sample size of the clipped scores, for the adaptive ratio.
        shifted_share: the effective sample size of the clipped scores, minus the lowest if that is negative. It shows
            whether a few examples would dominate a selection. An excess loss below 0 means that the learner has
            overtaken the expert on this example, not that the example has no value. If most are negative, the few above
            0 do not show that.
        unseen, broken: number of examples whose score is +inf, and -inf, or of their tokens.
    """

    mean: float
    share: float
    clipped_share: float
    shifted_share: float
    unseen: int
    broken: int


class Scores:
    """The scores of a pool. Their statistics are computed at first use: a collective, on all ranks.

    Args:
        values: fp32 [num_local], without NaN; +inf is selected first, -inf last.
        tokens: tokens of the examples; None if all are equally long.
    """

    def __init__(self, values: Tensor, *, sharding: ExampleSharding, tokens: Tokens | None = None):
        self.values, self.sharding, self.tokens = values, sharding, tokens

    @cached_property
    def summary(self) -> ScoreSummary:
        return summarize(self.values, sharding=self.sharding)

    @cached_property
    def metrics(self) -> Metrics:
        return self.compute_metrics(torch.zeros(0, dtype=torch.int64, device=self.values.device))[0]

    def compute_metrics(self, counts: Tensor) -> tuple[Metrics, list[int]]:
        """Compute the metrics, and the totals of ``counts``, int64 [n], over all ranks, in one all-reduce."""
        self.metrics, totals = compute_metrics(
            self.values, self.summary, sharding=self.sharding, counts=counts, tokens=self.tokens
        )
        return self.metrics, totals

    @cached_property
    def has_unseen(self) -> bool:
        """Whether any score may be +inf."""
        return self.summary.num_unseen > 0

    def below(self, edges: Tensor) -> Below:
        """Count the scores of all ranks below each of the sorted ``edges``, fp32 [n].

        A collective of 16 bytes per edge, or 32 with tokens.
        """
        num_bins = len(edges) + 1
        measures = [None] if self.tokens is None else [None, self.tokens.local]
        counts = torch.zeros(len(measures), num_bins, dtype=torch.int64, device=edges.device)
        for block in blocks(len(self.values), device=self.values.device):
            bins = torch.bucketize(self.values[block], edges, right=True)  # number of edges at or below the score
            for row, tokens in zip(counts, measures, strict=True):
                row += histogram(bins, block_of(tokens, block), num_bins=num_bins)
        totals = self.sharding.total(counts.flatten())
        examples = list(itertools.accumulate(totals[: num_bins - 1]))
        if self.tokens is None:
            return Below(examples, self.sharding.num_examples)
        num_tokens = list(itertools.accumulate(totals[num_bins:-1]))
        return Below(examples, self.sharding.num_examples, num_tokens, self.tokens.total)

    def without(self, excluded: Tensor) -> "Scores":
        """Set the scores to -inf where bool [num_local] ``excluded``, in place; their former values are lost."""
        values = self.values.masked_fill_(excluded, float("-inf"))
        remaining = Scores(values, sharding=self.sharding, tokens=self.tokens)
        remaining.has_unseen = self.has_unseen
        return remaining


_Transform = tuple[float, float, float]
"""(low, high, shift): the transform s -> s.clamp(low, high) + shift of a score s."""


def compute_metrics(
    scores: Tensor,
    summary: ScoreSummary,
    *,
    sharding: ExampleSharding,
    counts: Tensor,
    tokens: Tokens | None = None,
) -> tuple[Metrics, list[int]]:
    """The metrics of fp32 [num_local] scores, and the totals of ``counts``, int64 [n], over all ranks.

    A collective, one all-reduce.
    """
    transforms: list[_Transform] = [
        (summary.smallest, summary.largest, 0.0),
        (max(0.0, summary.low), max(0.0, summary.high), 0.0),
    ]
    plain, shifted = 0, 1  # without negative scores, the sums of transforms 0 and 1 serve twice
    if summary.smallest < 0:
        plain = len(transforms)
        transforms.append((0.0, max(0.0, summary.largest), 0.0))
    if summary.low < 0:
        shifted = len(transforms)
        transforms.append((summary.low, summary.high, -summary.low))
    local_sums = [_local_sums(scores, transform, tokens) for transform in transforms]
    infinite = [] if tokens is None else [_tokens_of_infinite(scores, tokens.local)]
    totals = sharding.total(torch.cat([local for local, _ in local_sums] + infinite + [counts]))
    totals, rest = totals[: 3 * len(transforms)], totals[3 * len(transforms) :]
    finite, unseen, broken = summary.num_finite, summary.num_unseen, summary.num_broken
    if tokens is not None:
        unseen, broken, *rest = rest
        finite = tokens.total - unseen - broken
    sums = [
        _without_infinite(totals[3 * i : 3 * i + 3], ends, unseen=unseen, broken=broken)
        for i, (_, ends) in enumerate(local_sums)
    ]
    share, clipped, shifted_share = (
        total * total / (finite * squares) if squares > 0 else 1.0
        for total, squares in (sums[plain], sums[1], sums[shifted])
    )
    return Metrics(sums[0][0] / max(1, finite), share, clipped, shifted_share, unseen, broken), rest


def _tokens_of_infinite(scores: Tensor, tokens: Tensor) -> Tensor:
    """int64 [2], the tokens of this rank's examples with a score of +inf, and of those with -inf."""
    infinity = float("inf")
    sums = torch.zeros(2, dtype=torch.int64, device=scores.device)
    for block in blocks(len(scores), device=scores.device):
        score, of_each = scores[block], tokens[block]
        sums += torch.stack(((of_each * (score == infinity)).sum(), (of_each * (score == -infinity)).sum()))
    return sums


@dataclass(frozen=True)
class _Ends:
    """The values, in units, that infinite scores were counted as, and the unit."""

    low: int
    high: int
    scale: float


def _local_sums(scores: Tensor, transform: _Transform, tokens: Tokens | None) -> tuple[Tensor, _Ends]:
    """int64 [3]: sum and sum of squares of this rank's values in units, the squares as two halves of 31 bits.

    With tokens, both sums count each value as often as its example has tokens.

    Infinite scores count as the ends of the clipping range; :func:`_without_infinite` subtracts them.
    """
    low, high, shift = transform
    ends = torch.tensor([low, high], dtype=torch.float32) + shift
    scale = float(ends.abs().max()) / _UNITS
    sums = torch.zeros(3, dtype=torch.int64, device=scores.device)
    if scale == 0.0:
        return sums, _Ends(0, 0, 0.0)
    for block in blocks(len(scores), device=scores.device):
        values = scores[block].clamp(low, high)
        units = _units(values.add_(shift) if shift else values, scale)
        if tokens is not None:
            sums += _sums_by_tokens(units.long(), tokens.local[block])
            continue
        # Exact: the units are whole numbers, and the squares of a block sum to less than 2^53.
        total, squares = units.sum().long(), torch.dot(units, units).long()
        sums += torch.stack((total, squares >> 31, squares & 0x7FFFFFFF))
    first, last = _units(ends.to(scores.device), scale).long().tolist()
    return sums, _Ends(first, last, scale)


def _sums_by_tokens(units: Tensor, tokens: Tensor) -> Tensor:
    """The same int64 [3] of int64 units, each at most 2^15, and int32 tokens. The squares are halved before they are
    summed: a product has at most 61 bits, and the sum of a block may have more than 63.
    """
    by_tokens = units * tokens
    squares = by_tokens * units
    return torch.stack((by_tokens.sum(), (squares >> 31).sum(), (squares & 0x7FFFFFFF).sum()))


def _units(values: Tensor, scale: float) -> Tensor:
    return values.double().div_(scale).round_()


def _without_infinite(sums: list[int], ends: _Ends, *, unseen: int, broken: int) -> tuple[float, float]:
    """Sum and sum of squares of the finite values."""
    total = sums[0] - broken * ends.low - unseen * ends.high
    squares = (sums[1] << 31) + sums[2] - broken * ends.low**2 - unseen * ends.high**2
    return total * ends.scale, squares * ends.scale * ends.scale
