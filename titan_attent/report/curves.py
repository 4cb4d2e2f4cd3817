"""What a curve of validations tells: how noisy it is, at which level it ended, where it was at a level. Pure.

Noise. How far a validation lies from the cubic through two neighbours on either side, scaled to one validation: the
median of those distances over the curve without its first quarter, times 1.4826. The neighbours are a twentieth of the
curve apart, so that a wobble which several validations in a row share counts as noise, too. A smooth curve has none. Of
few distances the median is uncertain, so it is taken for larger: by 1 + 2 / their number. What another seed would
change is not in it.

Level. The mean of the last validations, as far back as each lies within three times the noise of the last one. On a
curve without noise it is the last validation.

Crossing. The moment that divides a curve best in two: above the level before, not above it after. It is the
down-crossing for which the steps spent above before it, and not above after it, are the most; between two validations
steps are interpolated linearly. A curve that falls without noise has one such moment, the first. With noise the first
is too early, the more so the more often a run validates, while this one is early as often as late.

Values are better the smaller they are; of a measure that rises, hand over the negative.
"""

from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 20
"""Validations of a curve that are a noise's neighbours, about."""
LEAST = 5
"""Finite validations without which a curve does not show its noise: the cubic takes five."""


@dataclass(frozen=True)
class Crossing:
    """Of a level by a curve: at validation ``i``, or between that one and the one before, if ``share`` is below 1.

    Attributes:
        step: the moment.
        share: of the way from validation i - 1 to i.
        before: i - 1, None if that is not there or not finite: the curve may have been there earlier.
    """

    step: float
    i: int
    share: float
    before: int | None


def distances(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The distances of the docstring, each scaled to the noise of one validation; float64, empty for a short curve."""
    steps, values = (array[np.isfinite(values)].astype(float) for array in (steps, values))
    if len(steps) < LEAST:
        return np.zeros(0)
    late = max(0, min(int((steps <= steps[-1] / 4).sum()), len(steps) - 7))
    steps, values = steps[late:], values[late:]
    apart = max(1, len(steps) // NEIGHBOURS)
    middle = np.arange(2 * apart, len(steps) - 2 * apart)
    around = middle[:, None] + apart * np.array([-2, -1, 1, 2])
    x = (steps[around] - steps[middle, None]) / (steps[-1] - steps[0])
    # Lagrange's weights of the four neighbours at 0.
    weights = np.ones_like(x)
    for j in range(4):
        for k in (k for k in range(4) if k != j):
            weights[:, j] *= x[:, k] / (x[:, k] - x[:, j])
    off = values[middle] - (weights * values[around]).sum(axis=1)
    return np.abs(off) / np.sqrt(1 + (weights**2).sum(axis=1))


def noise(*curves: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Standard deviation of a validation, from one curve or from several alike; None if they are too short to show."""
    off = np.concatenate([distances(*curve) for curve in curves])
    return float(1.4826 * np.median(off) * (1 + 2 / len(off))) if len(off) else None


def level(steps: np.ndarray, values: np.ndarray) -> float | None:
    """Where a curve ended; not finite if its last validation is not, None without validations."""
    if not len(values):
        return None
    last = float(values[-1])
    if not np.isfinite(last):
        return last
    within = np.abs(values - last) <= 3 * (noise((steps, values)) or 0.0)  # never for nan
    outside = np.flatnonzero(~within)
    return float(values[(outside[-1] + 1 if len(outside) else 0) :].mean())


def crossing(steps: np.ndarray, values: np.ndarray, target: float) -> Crossing | None:
    """Where a curve was at ``target``; None if no validation is there. Validations that are not finite are above."""
    there, finite = values <= target, np.isfinite(values)
    found: list[Crossing] = []
    for i in np.flatnonzero(there & ~np.concatenate([[False], there[:-1]])).tolist():
        before = i - 1 if i and finite[i - 1] else None
        share = 1.0
        if before is not None and finite[i]:
            share = float((values[before] - target) / (values[before] - values[i]))
        start = steps[i] if before is None else steps[before]
        found.append(Crossing(float(start + share * (steps[i] - start)), i, share, before))
    if not found:
        return None
    spent = np.diff(steps).astype(float)
    below = np.zeros(len(spent))  # steps of each interval that are not above
    for i in range(len(spent)):
        if not (finite[i] and finite[i + 1]):
            below[i] = 0.0
        elif there[i] and there[i + 1]:
            below[i] = spent[i]
        elif there[i] or there[i + 1]:
            good, bad = sorted((float(values[i]), float(values[i + 1])))
            below[i] = spent[i] * (target - good) / (bad - good)

    def divides(at: Crossing) -> float:
        # Of the interval in which it lies the part above comes first.
        return float((spent - below)[: at.i].sum() + below[max(0, at.i - 1) :].sum())

    return max(found, key=divides)


def at(steps: np.ndarray, values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The curve's finite values at steps ``where``, linear between validations, nan outside of them."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.full(len(where), np.nan)
    return np.interp(where, steps[finite], values[finite], left=np.nan, right=np.nan)
