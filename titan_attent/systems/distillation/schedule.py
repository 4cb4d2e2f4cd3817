"""Which checkpoint of the source a step learns from, and the weight of the labels. Pure functions of the step.

A checkpoint is named by its own step, that of the source's training. Steps of the student count from 1. Nothing here
depends on ranks, or on where a run was resumed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from titan_attent.systems.distillation.config import DistillationConfig


class Phase(NamedTuple):
    """From ``first_step`` on, the source is its checkpoint of step ``checkpoint``."""

    first_step: int
    checkpoint: int


def phases_of(
    config: DistillationConfig, *, steps: int, checkpoints: Sequence[int], losses: Mapping[int, float]
) -> tuple[Phase, ...]:
    """The phases of a run, ascending; the first begins at step 1.

    Args:
        steps: steps of the whole run.
        checkpoints: steps of the source's checkpoints, ascending.
        losses: step -> loss of the source's own training; read by "two_shot".

    ValueError (what is wrong, how to fix it) if the checkpoints do not suffice.
    """
    if not checkpoints:
        raise ValueError("it holds no finished checkpoint: check the path")
    last = checkpoints[-1]
    if config.schedule == "final":
        return (Phase(1, last),)
    if config.schedule == "at":
        return _named(config.at, steps=steps, checkpoints=checkpoints)
    if config.schedule == "two_shot":
        first = steepest(losses, checkpoints)
        done = math.ceil(round(config.switch * steps, 6))  # 0.28 x 25 is a little more than 7
        return (Phase(1, first), Phase(min(1 + done, steps), last))
    return _even(config.num_checkpoints or len(checkpoints), steps=steps, checkpoints=checkpoints)


def _even(num: int, *, steps: int, checkpoints: Sequence[int]) -> tuple[Phase, ...]:
    if num > len(checkpoints):
        raise ValueError(f"it holds {len(checkpoints)} checkpoints, fewer than num_checkpoints = {num}: lower it")
    if num > steps:
        raise ValueError(f"{num} checkpoints for {steps} steps: set num_checkpoints to at most training.steps")
    chosen = [checkpoints[(i + 1) * len(checkpoints) // num - 1] for i in range(num)]
    return tuple(Phase(1 + i * steps // num, checkpoint) for i, checkpoint in enumerate(chosen))


def _named(pairs: str, *, steps: int, checkpoints: Sequence[int]) -> tuple[Phase, ...]:
    try:
        phases = tuple(Phase(*map(int, pair.split(":"))) for pair in pairs.replace(",", " ").split())
    except (ValueError, TypeError):
        raise ValueError(f'at = "{pairs}" is not a list of STEP:CHECKPOINT, such as "1:2000 501:8000"') from None
    first_steps = [phase.first_step for phase in phases]
    if first_steps[:1] != [1] or first_steps != sorted(set(first_steps)) or first_steps[-1] > steps:
        raise ValueError(
            f'at = "{pairs}": the steps must rise from 1 and not exceed training.steps = {steps}, so that every step '
            "has a source"
        )
    if missing := sorted({phase.checkpoint for phase in phases} - set(checkpoints)):
        raise ValueError(
            f'at = "{pairs}" names step-{missing[0]}, which is not there or was never finished; there are steps '
            f"{', '.join(map(str, checkpoints))}"
        )
    return phases


def steepest(losses: Mapping[int, float], checkpoints: Sequence[int]) -> int:
    """The checkpoint in the middle of the steepest fall of the source's loss, never the last one.

    The fall at a checkpoint is the mean loss between the checkpoint before (or the start) and it, less the mean loss
    from there to the next checkpoint, per step between the middles of the two. Of equal falls the earliest counts.

    ValueError if the logs do not say.
    """
    if len(checkpoints) < 2:
        raise ValueError(
            'schedule = "two_shot" needs two checkpoints, but it holds one: save more of the source, or use "final"'
        )
    falls: dict[int, float] = {}
    for before, checkpoint, after in zip((0, *checkpoints), checkpoints, checkpoints[1:], strict=False):
        earlier, later = (
            [loss for step, loss in losses.items() if first < step <= last and math.isfinite(loss)]
            for first, last in ((before, checkpoint), (checkpoint, after))
        )
        if earlier and later:
            fall = sum(earlier) / len(earlier) - sum(later) / len(later)
            falls[checkpoint] = 2 * fall / (after - before)
    if not falls:
        raise ValueError(
            'schedule = "two_shot" finds no loss of the source in the logs beside its checkpoints (tb/, tag '
            'loss_metrics/global_avg_loss): copy them there, or name the checkpoints with schedule = "at"'
        )
    return max(falls, key=lambda checkpoint: (falls[checkpoint], -checkpoint))


def source_at(phases: Sequence[Phase], step: int) -> int:
    """The checkpoint that ``step``, from 1, learns from."""
    return next(phase.checkpoint for phase in reversed(phases) if phase.first_step <= max(1, step))


def next_change(phases: Sequence[Phase], step: int) -> Phase | None:
    """The first phase after ``step`` with another checkpoint than that of ``step``; None if there is none."""
    current = source_at(phases, step)
    return next((phase for phase in phases if phase.first_step > step and phase.checkpoint != current), None)


def label_weight(config: DistillationConfig, *, step: int, steps: int) -> float:
    """The weight a of the labels in ``step``, of ``steps`` steps; in [0, 1]."""
    a = config.label_weight
    if config.label_weight_schedule == "linear":
        progress = (step - 1) / max(1, steps - 1)
        a += (config.final_label_weight - a) * min(1.0, progress)
    elif config.label_weight_schedule == "wsd":
        done, left = step / steps, (steps - step) / steps
        rise = min(1.0, done / config.warmup) if config.warmup else 1.0
        fall = min(1.0, left / config.decay) if config.decay else 1.0
        a = 1.0 - (1.0 - a) * min(rise, fall)
    return min(1.0, max(0.0, a))
