"""Where a run reached the validation loss, or the accuracy, at which the first run ended, and its cost up to there.

curves.py defines how a curve is smoothed, costs.py what is charged, and comparing.py when a saving is reported. The
first run is measured in the same way, so that a run saves nothing against itself. Accuracies are treated like losses,
except that larger values are better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from titan_attent.report import curves
from titan_attent.report.costs import Costs
from titan_attent.report.runs import ACCURACY, EXACT, VALIDATION, RunScalars

Charge = Literal["step", "tokens", "FLOPs", "seconds"]


@dataclass(frozen=True)
class Measure:
    """A value by which runs are compared at each validation. ``form`` is its format string."""

    tag: str
    name: str
    form: str
    rises: bool = False


LOSS = Measure(VALIDATION, "validation loss", "{:.4f}")
TOP1 = Measure(ACCURACY, "validation accuracy", "{:.2%}", rises=True)
MATCH = Measure(EXACT, "exact match", "{:.2%}", rises=True)
MEASURES = (LOSS, TOP1, MATCH)


@dataclass(frozen=True)
class Reached:
    """Where a run reached a loss or an accuracy.

    Attributes:
        step, tokens, seconds: its cost up to there; ``tokens`` is None if unknown.
        between: the steps of the validations before and after; None without a finite validation before, in which case
            the run may have reached the level earlier.
        flops: the number of trained tokens of equal cost; None if unknown.
    """

    step: float
    tokens: float | None
    seconds: float
    between: tuple[int, int] | None
    flops: float | None = None

    def cost(self, charge: Charge) -> float | None:
        return {"step": self.step, "tokens": self.tokens, "FLOPs": self.flops, "seconds": self.seconds}[charge]


def measures_of(runs: Sequence[RunScalars]) -> list[Measure]:
    """The values by which the runs can be compared: the loss, and the accuracies that one of them has."""
    return [LOSS, *(one for one in MEASURES[1:] if any(one.tag in run.scalars for run in runs))]


def final(run: RunScalars, measure: Measure) -> float | None:
    """The level at which a run ended, which may be nan or infinite; None without validations."""
    level = curves.level(*curve_of(run, measure))
    return -level if measure.rises and level is not None else level


def best(run: RunScalars, measure: Measure) -> float | None:
    """The best single validation of a run; None without a finite one."""
    values = curve_of(run, measure)[1]
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return float(-values.min() if measure.rises else values.min())


def curve_of(run: RunScalars, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """(steps int64 [n], values float64 [n]) of a measure; accuracies are negated, so that smaller is better."""
    steps, values = run.series(measure.tag)
    return steps, -values if measure.rises else values


def reach(run: RunScalars, target: float | None, measure: Measure = LOSS) -> Reached | None:
    """Where ``run`` reached ``target``; None if it did not, or if the target is not finite."""
    if target is None or not math.isfinite(target):
        return None
    steps, values = curve_of(run, measure)
    crossing = curves.crossing(steps, values, -target if measure.rises else target)
    if crossing is None:
        return None
    clock = run.seconds.get(measure.tag, {})
    until = clock[int(steps[crossing.i])]
    since = until if crossing.before is None else clock[int(steps[crossing.before])]
    between = None if crossing.before is None else (int(steps[crossing.before]), int(steps[crossing.i]))
    seconds = since + crossing.share * (until - since)
    costs = Costs(run)
    return Reached(crossing.step, costs.tokens(crossing.step), seconds, between, costs.charged_tokens(crossing.step))
