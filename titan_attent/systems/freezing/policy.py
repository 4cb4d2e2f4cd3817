"""The policies: from eigenvalues to the modules that stay active.

This is host arithmetic on a few hundred numbers, with the same result on every rank.

A policy gives every module a value. Modules are frozen in order of increasing value until the kept share of the
backward pass is closest to ``backward_share``. A module whose FLOPs would overshoot the target by more than leaving it
active undershoots is skipped, and a cheaper one of larger value may be frozen instead.

Values are comparable within a module type (``Unit.kind``) only, so they are divided by the mean of the type. Let alpha
be the largest frozen value: apart from skipped ones, all modules below alpha times the mean of their type are frozen.
This alpha corresponds to the dynamic threshold of MAT, whose formula is not public.

- ``mat``, ``random``, ``gradient_norm`` freeze single modules of types with several members, and keep at least one of
  each type active.
- ``prefix`` evaluates every cut of the model. It freezes everything below the cut, the embedding included, and single
  modules above it if more must be saved. It takes the cut that loses the least value.
- ``truncated`` takes the cut whose savings are closest to the target, and freezes nothing above it. It uses no values.
- ``stages`` is a schedule: which part of every layer is active follows from the step alone, so nothing of it is stored.
- ``random`` and ``gradient_norm`` use keys with Gumbel noise as values. The active modules are then a sample without
  replacement, in proportion to their weights.

Hysteresis, the temporal rule with its rest, the interval and the smoothing are not from the paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_attent.foundations.counter_rng import derive_key, gumbel, permute
from titan_attent.systems.freezing.config import FreezingConfig, Stage
from titan_attent.systems.freezing.units import Unit, backward_flops, saved_flops

DRAW_STREAM, SHUFFLE_STREAM = 103, 104
"""Stream numbers for counter_rng.py. They must not change, so that resumed runs continue the same draws."""


@dataclass
class History:
    """The state of the decisions, stored in the checkpoint as JSON.

    Attributes:
        active: whether each module is active.
        decisions: number of decisions made.
        first: eigenvalue of each module in the first probe.
        smooth: moving average of each module's eigenvalue.
        distances: D_t = |smooth - first| at the last decision; empty before it exists.
        first_distances: D_1; empty before it exists.
        resting: number of decisions for which each module still counts as settled.
    """

    active: list[bool]
    decisions: int = 0
    first: list[float] = field(default_factory=list)
    smooth: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    first_distances: list[float] = field(default_factory=list)
    resting: list[int] = field(default_factory=list)

    def update(self, values: Sequence[float], config: FreezingConfig) -> None:
        """Add the values of a probe. A value that is not finite leaves its module's average unchanged."""
        if not self.first:
            self.first = [value if math.isfinite(value) else 0.0 for value in values]
            self.smooth, self.resting = list(self.first), [0] * len(self.first)
            return
        keep = config.smoothing
        self.smooth = [
            keep * old + (1 - keep) * new if math.isfinite(new) else old
            for old, new in zip(self.smooth, values, strict=True)
        ]
        distances = [abs(now - before) for now, before in zip(self.smooth, self.first, strict=True)]
        self.resting = [max(0, left - 1) for left in self.resting]
        if not self.distances:
            self.first_distances = distances
        else:
            for i, (now, before, first) in enumerate(zip(distances, self.distances, self.first_distances, strict=True)):
                if first > 0 and abs(now - before) / first < config.beta:
                    self.resting[i] = config.rest
        self.distances = distances

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


def decide(units: Sequence[Unit], history: History, config: FreezingConfig) -> list[bool]:
    """Decide which units are active from now on. Counts the decision in ``history``, but does not apply it."""
    history.decisions += 1
    if config.policy in ("off", "all"):
        return [True] * len(units)
    target = (1 - config.backward_share) * backward_flops(units)
    if config.policy == "truncated":
        return _truncate(units, target)
    values = _values(units, history, config)
    if config.policy == "prefix":
        return _freeze_prefix(units, values, target)
    return _freeze(units, [True] * len(units), values, target)


def stage_of(stages: Sequence[Stage], step: int, *, warmup_steps: int) -> int:
    """The number of the stage of step ``step``, the first step being 1; -1 in the warm-up."""
    start = warmup_steps
    if step <= start:
        return -1
    for number, stage in enumerate(stages):
        if stage.steps is None or step <= start + stage.steps:
            return number
        start += stage.steps
    raise AssertionError("the last stage lasts until the end")


def units_of_stage(units: Sequence[Unit], stage: Stage | None) -> list[bool]:
    """Which units a stage trains; None for the warm-up, which trains all."""
    part = "both" if stage is None else stage.part
    trained = {"attention": {"attention"}, "feed_forward": {"feed_forward", "moe"}}.get(part)
    layers = ("attention", "feed_forward", "moe")
    return [trained is None or unit.kind not in layers or unit.kind in trained for unit in units]


def _values(units: Sequence[Unit], history: History, config: FreezingConfig) -> list[float]:
    """The value of each unit, frozen in increasing order; at least 0, except for random draws."""
    indices = torch.arange(len(units))
    noise = gumbel(indices, derive_key(config.seed, DRAW_STREAM, history.decisions)).tolist()
    if config.policy == "random":
        return noise
    values = relative(units, _shuffled(units, history.smooth, config) if config.shuffle else history.smooth)
    if config.policy == "gradient_norm":
        return [math.log(max(value, 1e-30)) + unit_noise for value, unit_noise in zip(values, noise, strict=True)]
    bonus = [1 + config.hysteresis if on else 1 - config.hysteresis for on in history.active]
    settled = [config.beta > 0 and left > 0 for left in history.resting]
    return [0.0 if rests else value * factor for value, factor, rests in zip(values, bonus, settled, strict=True)]


def relative(units: Sequence[Unit], values: Sequence[float]) -> list[float]:
    """Divide each value by the mean of its unit's type."""
    sums: dict[str, list[float]] = {}
    for unit, value in zip(units, values, strict=True):
        sums.setdefault(unit.kind, []).append(value)
    means = {kind: sum(members) / len(members) for kind, members in sums.items()}
    return [value / means[unit.kind] if means[unit.kind] else 0.0 for unit, value in zip(units, values, strict=True)]


def _shuffled(units: Sequence[Unit], values: Sequence[float], config: FreezingConfig) -> list[float]:
    """Permute the values within each module type, with one permutation for the whole run."""
    result = list(values)
    for number, kind in enumerate(dict.fromkeys(unit.kind for unit in units)):
        members = [i for i, unit in enumerate(units) if unit.kind == kind]
        key = derive_key(config.seed, SHUFFLE_STREAM, number)
        sources = permute(torch.arange(len(members)), len(members), key).tolist()
        for member, source in zip(members, sources, strict=True):
            result[member] = values[members[source]]
    return result


def _saved(units: Sequence[Unit], active: Sequence[bool]) -> float:
    return sum(saved_flops(units, active))


def _freeze(units: Sequence[Unit], active: list[bool], order: Sequence[float], target: float) -> list[bool]:
    """Freeze active units by increasing ``order`` until the saved FLOPs are as close to ``target`` as possible.

    At least one unit of each type stays active.
    """
    active, left = list(active), dict[str, int]()
    for unit, on in zip(units, active, strict=True):
        left[unit.kind] = left.get(unit.kind, 0) + on
    saved, first = _saved(units, active), active.index(True)
    for i in sorted(range(len(units)), key=lambda i: (order[i], i)):
        if saved >= target:
            break
        if not active[i] or left[units[i].kind] < 2:
            continue
        # Freezing the first active module also saves the input gradients up to the next active one.
        above = active.index(True, i + 1) if i == first else i
        gain = units[i].weight + sum(unit.inputs for unit in units[i:above])
        if saved + gain - target > target - saved:
            continue
        active[i], saved = False, saved + gain
        first = above if i == first else first
        left[units[i].kind] -= 1
    return active


def _freeze_prefix(units: Sequence[Unit], values: Sequence[float], target: float) -> list[bool]:
    """Take the cut that freezes the least value; among equals the lowest."""
    per_flop = [value / unit.weight if unit.weight else math.inf for value, unit in zip(values, units, strict=True)]
    best: tuple[tuple[float, float], list[bool]] | None = None
    for cut in range(len(units) - 1):
        below = [i >= cut for i in range(len(units))]
        over = _saved(units, below) - target
        before = _saved(units, [i >= cut - 1 for i in range(len(units))]) - target if cut else -target
        if over > 0 and over > -before:
            break  # the previous cut was closer to the target, and higher cuts save even more
        active = _freeze(units, below, per_flop, target)
        short = target - _saved(units, active)
        lost = sum(value for value, on in zip(values, active, strict=True) if not on)
        # A cut that cannot reach the target loses to one that can.
        cost = (lost, 0.0) if short <= 0.02 * backward_flops(units) else (math.inf, short)
        if best is None or cost < best[0]:
            best = cost, active
    assert best is not None
    return best[1]


def _truncate(units: Sequence[Unit], target: float) -> list[bool]:
    """Freeze all units below the cut whose saved FLOPs are closest to ``target``; among equals the lowest.

    The topmost unit stays active.
    """
    cuts = [[i >= cut for i in range(len(units))] for cut in range(len(units))]
    return min(cuts, key=lambda active: abs(_saved(units, active) - target))
