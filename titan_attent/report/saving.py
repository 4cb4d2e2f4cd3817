"""Where a run was at the validation loss, or the accuracy, at which the first run ended, and what it had cost there.

How a curve is smoothed says curves.py, what is charged costs.py, and where it makes a saving comparing.py. The first
run is measured alike, so that a run saves nothing against itself. An accuracy rises, and all else is the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from titan_attent.report import curves
from titan_attent.report.costs import Costs
from titan_attent.report.runs import ACCURACY, VALIDATION, RunScalars

Charge = Literal["step", "tokens", "FLOPs", "seconds"]


@dataclass(frozen=True)
class Measure:
    """What a run is judged by at each validation. ``form`` is how it is written."""

    tag: str
    name: str
    form: str
    rises: bool = False


LOSS = Measure(VALIDATION, "validation loss", "{:.4f}")
TOP1 = Measure(ACCURACY, "validation accuracy", "{:.2%}", rises=True)


@dataclass(frozen=True)
class Reached:
    """Where a run was at a loss or an accuracy. ``between``: the steps of the two validations; None if no usable
    validation came before, so that it may have been there earlier. ``tokens`` and ``flops`` are None where the run
    does not tell; ``flops`` counts trained tokens that cost as much."""

    step: float
    tokens: float | None
    seconds: float
    between: tuple[int, int] | None
    flops: float | None = None

    def cost(self, charge: Charge) -> float | None:
        return {"step": self.step, "tokens": self.tokens, "FLOPs": self.flops, "seconds": self.seconds}[charge]


def measures_of(runs: Sequence[RunScalars]) -> list[Measure]:
    """What the runs can be compared by: the loss, and the accuracy where one of them has it."""
    return [LOSS, TOP1] if any(TOP1.tag in run.scalars for run in runs) else [LOSS]


def final(run: RunScalars, measure: Measure) -> float | None:
    """The level at which a run ended, perhaps not finite; None without validations."""
    level = curves.level(*curve_of(run, measure))
    return -level if measure.rises and level is not None else level


def curve_of(run: RunScalars, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Steps int64 [n] and values float64 [n], the smaller the better."""
    steps, values = run.series(measure.tag)
    return steps, -values if measure.rises else values


def reach(run: RunScalars, target: float | None, measure: Measure = LOSS) -> Reached | None:
    """Where ``run`` was at ``target``; None if it was not, or if there is no finite target."""
    if target is None or not math.isfinite(target):
        return None
    steps, values = curve_of(run, measure)
    found = curves.crossing(steps, values, -target if measure.rises else target)
    if found is None:
        return None
    clock = run.seconds.get(measure.tag, {})
    until = clock[int(steps[found.i])]
    since = until if found.before is None else clock[int(steps[found.before])]
    between = None if found.before is None else (int(steps[found.before]), int(steps[found.i]))
    seconds = since + found.share * (until - since)
    costs = Costs(run)
    return Reached(found.step, costs.tokens(found.step), seconds, between, costs.charged_tokens(found.step))
