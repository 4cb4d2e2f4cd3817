"""A validation curve: how noisy it is, at which level it ended, where it crossed a level. Pure functions.

Noise. The distance of a validation from the cubic through two neighbours on either side, scaled to one validation. The
noise is 1.4826 times the median of these distances over the curve without its first quarter. Neighbours are a twentieth
of the curve from each other, so that a fluctuation shared by several successive validations counts as noise, too. A
smooth curve has none. The median of few distances is uncertain, so it is multiplied by 1 + 2 / their number.
Differences between seeds are not included.

Level. The mean of the last validations, as far back as each lies within three times the noise of the last one. On a
curve without noise it is the last validation.

Crossing. The moment that best divides a curve in two: above the level before it, not above it afterwards. It is the
down-crossing with the most steps that are above before it or not above after it. Between two validations, steps are
interpolated linearly. A falling curve without noise has one down-crossing. With noise, the first down-crossing is too
early, and more so the more often a run validates; the dividing one is early as often as late.

Smaller values are better; for a measure that rises, pass the negative.
"""

from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 20
"""The number of validations in a curve, divided by the distance between neighbours."""
MIN_VALIDATIONS = 5
"""Finite validations from which on the noise of a curve can be estimated: a distance takes five."""


@dataclass(frozen=True)
class Crossing:
    """The crossing of a level by a curve, at validation ``i``, or between ``i - 1`` and ``i`` if ``share`` is below 1.

    Attributes:
        step: the step of the crossing.
        share: the fraction of the way from validation i - 1 to i.
        before: i - 1; None if that does not exist or is not finite, so that the curve may have crossed earlier.
    """

    step: float
    i: int
    share: float
    before: int | None


def distances(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The distances that the module docstring defines, scaled to one validation; float64, empty for a short curve."""
    steps, values = (array[np.isfinite(values)].astype(float) for array in (steps, values))
    if len(steps) < MIN_VALIDATIONS:
        return np.zeros(0)
    skipped = max(0, min(int((steps <= steps[-1] / 4).sum()), len(steps) - 7))
    steps, values = steps[skipped:], values[skipped:]
    gap = max(1, len(steps) // NEIGHBOURS)
    middle = np.arange(2 * gap, len(steps) - 2 * gap)
    around = middle[:, None] + gap * np.array([-2, -1, 1, 2])
    x = (steps[around] - steps[middle, None]) / (steps[-1] - steps[0])
    # Lagrange's weights of the four neighbours at 0.
    weights = np.ones_like(x)
    for j in range(4):
        for k in (k for k in range(4) if k != j):
            weights[:, j] *= x[:, k] / (x[:, k] - x[:, j])
    off = values[middle] - (weights * values[around]).sum(axis=1)
    return np.abs(off) / np.sqrt(1 + (weights**2).sum(axis=1))


def noise(*curves: tuple[np.ndarray, np.ndarray]) -> float | None:
    """The standard deviation of a validation, from one curve or several; None if they are too short to estimate it."""
    off = np.concatenate([distances(*curve) for curve in curves])
    return float(1.4826 * np.median(off) * (1 + 2 / len(off))) if len(off) else None


def level(steps: np.ndarray, values: np.ndarray) -> float | None:
    """The level at which a curve ended; not finite if its last validation is not; None without validations."""
    if not len(values):
        return None
    last = float(values[-1])
    if not np.isfinite(last):
        return last
    within = np.abs(values - last) <= 3 * (noise((steps, values)) or 0.0)  # never for nan
    outside = np.flatnonzero(~within)
    return float(values[(outside[-1] + 1 if len(outside) else 0) :].mean())


def crossing(steps: np.ndarray, values: np.ndarray, target: float) -> Crossing | None:
    """Where a curve crossed ``target``; None if no validation reached it. Validations that are not finite are above."""
    reached, finite = values <= target, np.isfinite(values)
    crossings: list[Crossing] = []
    for i in np.flatnonzero(reached & ~np.concatenate([[False], reached[:-1]])).tolist():
        before = i - 1 if i and finite[i - 1] else None
        share = 1.0
        if before is not None and finite[i]:
            share = float((values[before] - target) / (values[before] - values[i]))
        start = steps[i] if before is None else steps[before]
        crossings.append(Crossing(float(start + share * (steps[i] - start)), i, share, before))
    if not crossings:
        return None
    widths = np.diff(steps).astype(float)
    below = np.zeros(len(widths))  # steps of each interval that are not above the target
    for i in range(len(widths)):
        if not (finite[i] and finite[i + 1]):
            below[i] = 0.0
        elif reached[i] and reached[i + 1]:
            below[i] = widths[i]
        elif reached[i] or reached[i + 1]:
            good, bad = sorted((float(values[i]), float(values[i + 1])))
            below[i] = widths[i] * (target - good) / (bad - good)

    def divides(at: Crossing) -> float:
        # In the interval that holds the crossing, the steps above come first.
        return float((widths - below)[: at.i].sum() + below[max(0, at.i - 1) :].sum())

    return max(crossings, key=divides)


def at(steps: np.ndarray, values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The curve at steps ``where``: linear between finite validations, nan outside of them."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.full(len(where), np.nan)
    return np.interp(where, steps[finite], values[finite], left=np.nan, right=np.nan)
