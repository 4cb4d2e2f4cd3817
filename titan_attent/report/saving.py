"""What a run needed to reach the validation loss that the first run ended with.

The target is the last validation loss of the first run. A run reaches it at the first validation that is not above it;
between that validation and the one before, steps, tokens and seconds are interpolated linearly in the loss. A falling
loss curve bends below its chord, so the moment told is later than the true one rather than earlier, by less than one
interval between two validations of that run; runs that validate at different steps can be compared to that precision.

The first run is measured the same way: had it been at its final loss before, the saving counts from there, and a run
compared with itself saves nothing. Only tokens that were trained on count; scoring passes show in the seconds alone.
"""

import math
from dataclasses import dataclass

from titan_attent.report.runs import VALIDATION, Axis, RunScalars


@dataclass(frozen=True)
class Reached:
    """Where a run first was at a loss. ``between``: the steps of the two validations; None if no usable validation
    came before, so that the loss may have been reached earlier. ``tokens`` is None where the run does not tell."""

    step: float
    tokens: float | None
    seconds: float
    between: tuple[int, int] | None

    def cost(self, axis: Axis) -> float | None:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}[axis]


def target_loss(first: RunScalars) -> float | None:
    """The last validation loss of the first run: nats a token, perhaps not finite; None without validations."""
    return next(reversed(first.scalars.get(VALIDATION, {}).values()), None)


def reach(run: RunScalars, target: float | None) -> Reached | None:
    """Where ``run`` first was at ``target``; None if it was not, or if there is no finite target."""
    if target is None or not math.isfinite(target):
        return None
    losses, seconds = run.scalars.get(VALIDATION, {}), run.seconds.get(VALIDATION, {})
    before: int | None = None  # the step of the validation before, if that has a finite loss
    for step, loss in losses.items():
        if loss <= target:  # never for nan
            share = 1.0  # of the way from the validation before
            if before is not None and math.isfinite(loss):
                share = (losses[before] - target) / (losses[before] - loss)
            start, since = (step, seconds[step]) if before is None else (before, seconds[before])
            at = start + share * (step - start)
            tokens = at * run.tokens_per_step if run.tokens_per_step else None
            when = since + share * (seconds[step] - since)
            return Reached(at, tokens, when, None if before is None else (before, step))
        before = step if math.isfinite(loss) else None
    return None


def saved_percent(run: Reached, first: Reached, axis: Axis) -> float | None:
    """How much less than the first run ``run`` needed, in percent; negative if more; None where it cannot be told."""
    own, base = run.cost(axis), first.cost(axis)
    return None if own is None or not base else 100 * (1 - own / base)
