"""What a run needed to reach the validation loss, or the accuracy, that the first run ended with.

The target is the last validation loss of the first run. A run reaches it at the first validation that is not above it;
between that validation and the one before, steps, tokens and seconds are interpolated linearly in the loss. A falling
loss curve bends below its chord, so the moment told is later than the true one rather than earlier, by less than one
interval between two validations of that run; runs that validate at different steps can be compared to that precision.
An accuracy is reached at the first validation that is not below it, and all else is the same.

The first run is measured the same way: had it been at its final loss before, the saving counts from there, and a run
compared with itself saves nothing. Only tokens that were trained on count; scoring passes show in the seconds alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from titan_attent.report.runs import ACCURACY, VALIDATION, Axis, RunScalars


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
    """Where a run first was at a loss or an accuracy. ``between``: the steps of the two validations; None if no usable
    validation came before, so that it may have been there earlier. ``tokens`` is None where the run does not tell."""

    step: float
    tokens: float | None
    seconds: float
    between: tuple[int, int] | None

    def cost(self, axis: Axis) -> float | None:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}[axis]


def measures_of(runs: Sequence[RunScalars]) -> list[Measure]:
    """What the runs can be compared by: the loss, and the accuracy where one of them has it."""
    return [LOSS, TOP1] if any(TOP1.tag in run.scalars for run in runs) else [LOSS]


def final(run: RunScalars, measure: Measure) -> float | None:
    """The last of it in a run, perhaps not finite; None without validations."""
    return next(reversed(run.scalars.get(measure.tag, {}).values()), None)


def target_loss(first: RunScalars) -> float | None:
    """The last validation loss of the first run: :func:`final` of the loss."""
    return final(first, LOSS)


def reach(run: RunScalars, target: float | None, measure: Measure = LOSS) -> Reached | None:
    """Where ``run`` first was at ``target``; None if it was not, or if there is no finite target."""
    if target is None or not math.isfinite(target):
        return None
    logged, seconds = run.scalars.get(measure.tag, {}), run.seconds.get(measure.tag, {})
    before: int | None = None  # the step of the validation before, if that has a finite value
    for step, value in logged.items():
        if value >= target if measure.rises else value <= target:  # never for nan
            share = 1.0  # of the way from the validation before
            if before is not None and math.isfinite(value):
                share = (logged[before] - target) / (logged[before] - value)
            start, since = (step, seconds[step]) if before is None else (before, seconds[before])
            at = start + share * (step - start)
            tokens = at * run.tokens_per_step if run.tokens_per_step else None
            when = since + share * (seconds[step] - since)
            return Reached(at, tokens, when, None if before is None else (before, step))
        before = step if math.isfinite(value) else None
    return None


def saved_percent(run: Reached, first: Reached, axis: Axis) -> float | None:
    """How much less than the first run ``run`` needed, in percent; negative if more; None where it cannot be told."""
    own, base = run.cost(axis), first.cost(axis)
    return None if own is None or not base else 100 * (1 - own / base)
