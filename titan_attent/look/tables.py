"""The numbers of a look: the sources, the histogram of the scores or lengths, and the shares at other cuts. Pure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from titan_attent.look.decision import Decision, RunSize

NUM_BINS = 20
TAIL = 0.005
"""Share of the values at each end that lies in the outermost bins, so that a few outliers do not set the scale."""
CUTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class SourceRow(NamedTuple):
    """A source: its examples and tokens, and the shares of them that are kept; None without a decision."""

    name: str
    examples: int
    tokens: int
    kept: float | None
    kept_tokens: float | None


def source_rows(
    names: Sequence[str], source_of: np.ndarray, lengths: np.ndarray, kept: np.ndarray | None
) -> list[SourceRow]:
    """A row per source, and a last one, "all", for all of the data if there are several."""
    num = len(names)
    examples = np.bincount(source_of, minlength=num)
    tokens = np.bincount(source_of, weights=lengths, minlength=num)
    kept_examples = np.zeros(num) if kept is None else np.bincount(source_of[kept], minlength=num)
    kept_tokens = np.zeros(num) if kept is None else np.bincount(source_of[kept], weights=lengths[kept], minlength=num)
    rows = [(name, examples[i], tokens[i], kept_examples[i], kept_tokens[i]) for i, name in enumerate(names)]
    if num > 1:
        rows.append(("all", examples.sum(), tokens.sum(), kept_examples.sum(), kept_tokens.sum()))
    return [
        SourceRow(
            name,
            int(of_all),
            int(of_tokens),
            None if kept is None else float(of_kept / max(1, of_all)),
            None if kept is None else float(tokens_kept / max(1, of_tokens)),
        )
        for name, of_all, of_tokens, of_kept, tokens_kept in rows
    ]


class Bin(NamedTuple):
    """A bin of a histogram: its bounds, and the shares of the examples in it; of the trusted ones, too."""

    low: float
    high: float
    kept: float
    dropped: float
    trusted: float | None


def histogram(
    values: np.ndarray, *, kept: np.ndarray | None, trusted: np.ndarray, num_bins: int = NUM_BINS
) -> list[Bin]:
    """Bins of equal width, ascending; the outermost hold everything beyond them, too.

    Args:
        values: [N], finite.
        kept: bool [N]; None counts all as kept.
        trusted: [T] of the same scale; may be empty.
    """
    low, high = np.quantile(values, [TAIL, 1 - TAIL]).tolist()
    if high <= low:
        low, high = float(values.min()), float(values.max())
    if high <= low:
        high = low + max(1e-6, abs(low) * 1e-6)
    num_bins = NUM_BINS
    if np.issubdtype(values.dtype, np.integer):  # whole bounds
        low, high = math.floor(low), math.ceil(high)
        step = -(-(high - low + 1) // NUM_BINS)
        num_bins = -(-(high - low + 1) // step)
        high = low + num_bins * step
    edges = np.linspace(low, high, num_bins + 1)
    is_kept = np.ones(len(values), dtype=bool) if kept is None else kept

    def shares(of: np.ndarray, total: int) -> np.ndarray:
        slots = np.clip(np.searchsorted(edges, of, side="right") - 1, 0, num_bins - 1)
        return np.bincount(slots, minlength=num_bins) / max(1, total)

    inside, outside = shares(values[is_kept], len(values)), shares(values[~is_kept], len(values))
    of_trusted = shares(trusted, len(trusted)).tolist() if len(trusted) else [None] * num_bins
    return [
        Bin(float(edges[i]), float(edges[i + 1]), float(inside[i]), float(outside[i]), of_trusted[i])
        for i in range(num_bins)
    ]


class Cut(NamedTuple):
    """A cut: what would be kept with it.

    Attributes:
        share: of all tokens; of all examples where these are equally long.
        score: the lowest score that is kept.
        trusted: share of the trusted examples that score at least as high; None without them.
        by_source: the share of each source, in the same measure.
        visits: how often a run of this size trains each kept example; None if its steps are not known.
        is_chosen: whether it is the cut of the decision.
    """

    share: float
    score: float
    trusted: float | None
    by_source: tuple[float, ...]
    visits: float | None
    is_chosen: bool


def cuts(
    decision: Decision, source_of: np.ndarray, num_sources: int, *, lengths: np.ndarray, size: RunSize, rows: int
) -> list[Cut]:
    """The shares of :data:`CUTS`, everything, and the share of the decision, ascending. Shares are of tokens.

    Args:
        lengths: [N], tokens of each example, or any equal numbers.
        rows: rows that the data fill, to count how often an example is trained.
    """
    assert decision.kept is not None
    order = np.argsort(-decision.scores, kind="stable")
    until = lengths[order].cumsum()
    total, num = int(until[-1]), len(order)
    totals = np.maximum(1, np.bincount(source_of, weights=lengths, minlength=num_sources))
    # As the teacher: an example is taken while the tokens before it are fewer than the share.
    sizes = {min(num, int(np.searchsorted(until, round(share * total))) + 1): False for share in (*CUTS, 1.0)}
    sizes[int(decision.kept.sum())] = True
    result = []
    for k in sorted(sizes):
        chosen = order[:k] if not sizes[k] else np.flatnonzero(decision.kept)
        lowest = float(decision.scores[chosen].min())
        trusted = None
        if len(decision.trusted):
            trusted = float((decision.trusted >= lowest).mean())
        by_source = np.bincount(source_of[chosen], weights=lengths[chosen], minlength=num_sources) / totals
        share = float(lengths[chosen].sum() / total)
        visits = size.steps * size.batch / (rows * share) if size.steps else None
        visits = decision.visits if sizes[k] else visits
        result.append(Cut(share, lowest, trusted, tuple(by_source.tolist()), visits, sizes[k]))
    return result
