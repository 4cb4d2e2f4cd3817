"""The arms of the distillation experiment: which checkpoint of the source a student learns from, and how. Pure.

``MIDDLE`` is the checkpoint inside the steepest fall of the source's loss, as ``schedule = "two_shot"`` finds it. A
student of the other arms changes sources at the same step, so that arms differ in one thing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.distillation.schedule import Phase, phases_of, steepest

BEFORE, MIDDLE, AFTER, LAST, EVERY = "before", "middle", "after", "last", "every"
SWITCH = 0.25
"""Share of the steps after which the last checkpoint is the source."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table.

    Attributes:
        about: its description.
        first: the checkpoint that the first quarter learns from; ``EVERY``: all in turn, equally many steps
            each; "" for the labels alone.
        temperature: of the source; 0 for its largest logit.
        softened: the first quarter's temperature is the one at which the last checkpoint has the mean entropy of
            ``MIDDLE``.
        equal_flops: it takes as many steps as a two-shot run costs, the source's passes and training included. It ends
            when it has reached the target.
    """

    about: str
    first: str = ""
    temperature: float = 1.0
    softened: bool = False
    equal_flops: bool = False


LABELS, LABELS_LONG, ONE_SHOT, TWO_SHOT = "labels", "labels, equal FLOPs", "one-shot", "two-shot"
PROGRESSIVE = "progressive"
WRONG_PHASE = "before the fall"
TEMPERATURES = {"argmax": 0.0, "T = 0.5": 0.5, "T = 2": 2.0}

ARMS: dict[str, Arm] = {
    LABELS: Arm(about="cross-entropy with the labels, no source"),
    LABELS_LONG: Arm(
        about="the same, with as many steps as a two-shot run costs, source's passes and training charged",
        equal_flops=True,
    ),
    ONE_SHOT: Arm(about="the source's last checkpoint in all steps", first=LAST),
    TWO_SHOT: Arm(about="a checkpoint inside the steepest fall, then the last", first=MIDDLE),
    WRONG_PHASE: Arm(about="a checkpoint at half the steps of that one, then the last", first=BEFORE),
    "after the fall": Arm(about="a checkpoint half-way between that one and the last, then the last", first=AFTER),
    "softened last": Arm(
        about="the last checkpoint, at first at the temperature that gives it the entropy of the one inside the fall",
        first=LAST,
        softened=True,
    ),
    PROGRESSIVE: Arm(about="all checkpoints in turn", first=EVERY),
    **{
        f"{name}, {text}": Arm(about=f"{name}; {of_source}", first=first, temperature=temperature)
        for name, first in ((ONE_SHOT, LAST), (TWO_SHOT, MIDDLE), (PROGRESSIVE, EVERY))
        for text, temperature in TEMPERATURES.items()
        if temperature == 0.0 or first != EVERY
        for of_source in [f"temperature {temperature:g} on the source" if temperature else "its largest logit alone"]
    },
}


def named_checkpoints(losses: Mapping[int, float], checkpoints: Sequence[int]) -> dict[str, int]:
    """The checkpoints by their names, from the losses of the source's training."""
    middle, last = steepest(losses, checkpoints), checkpoints[-1]

    def nearest(step: float) -> int:
        return min(checkpoints, key=lambda checkpoint: abs(checkpoint - step))

    return {BEFORE: nearest(middle / 2), MIDDLE: middle, AFTER: nearest((middle + last) / 2), LAST: last}


def phases(arm: Arm, *, steps: int, losses: Mapping[int, float], checkpoints: Sequence[int]) -> tuple[Phase, ...]:
    """The schedule of an arm with a source, by the package's own function."""
    names = named_checkpoints(losses, checkpoints)
    if arm.first == EVERY:
        config = DistillationConfig(schedule="even", source="source")
    elif arm.first == MIDDLE:
        config = DistillationConfig(schedule="two_shot", source="source", switch=SWITCH)
    else:
        at = f"1:{names[arm.first]} {1 + math.ceil(SWITCH * steps)}:{names[LAST]}"
        config = DistillationConfig(schedule="at", source="source", at=at)
    return phases_of(config, steps=steps, checkpoints=checkpoints, losses=losses)
