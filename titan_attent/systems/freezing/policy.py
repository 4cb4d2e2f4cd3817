"""Eigenvalues -> which modules stay active. Host arithmetic on a few hundred numbers, the same on every rank.

A policy gives every module a value; the modules of least value are frozen, one after the other, until the share of the
backward pass that is left comes closest to ``backward_share``. Values compare within a kind: they are divided by the
mean of their kind, so that with alpha = the largest frozen value, the modules below alpha times the mean of their kind
are frozen, but for those whose cost alone would miss the share by more than leaving them does: they are passed over, so
that a module of more value but less cost may be frozen instead. That alpha is the dynamic threshold of MAT, whose
formula is not public.

Scattered policies freeze modules of kinds with several members, and leave one active of each. ``prefix`` weighs every
cut of the model: freeze everything below it, the embedding included, and above it scattered modules as far as still
needed; it takes the cut that loses the least value. ``truncated`` takes the cut that saves what is to be saved, and
nothing above it: no value counts. In a draw (``random``, ``gradient_norm``) keys with Gumbel noise
take the place of values: the modules kept are a sample without replacement in proportion to their weight.

Hysteresis, temporal rule and its rest are ours, as are the interval and the smoothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_attent.foundations.counter_rng import derive_key, gumbel, permute
from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.freezing.units import Unit, backward_flops, saved_flops

DRAW_STREAM, SHUFFLE_STREAM = 103, 104
"""Streams of random numbers (counter_rng.py), by number: checkpoints of before go on with the same draws."""


@dataclass
class History:
    """What decisions leave behind; in the checkpoint as JSON.

    Attributes:
        decisions: number of decisions made.
        first: eigenvalues of the first probe.
        smooth: their moving average.
        distances: D_t of the decision before, and D_1: |smooth - first|; empty before they exist.
        resting: decisions for which each module still counts as settled.
        active: of each module.
    """

    active: list[bool]
    decisions: int = 0
    first: list[float] = field(default_factory=list)
    smooth: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    first_distances: list[float] = field(default_factory=list)
    resting: list[int] = field(default_factory=list)

    def see(self, values: Sequence[float], config: FreezingConfig) -> None:
        """Take in the values of a probe; what is not finite leaves a module's average as it was."""
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
            for i, (now, before, unit) in enumerate(zip(distances, self.distances, self.first_distances, strict=True)):
                if unit > 0 and abs(now - before) / unit < config.beta:
                    self.resting[i] = config.rest
        self.distances = distances

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


def decide(units: Sequence[Unit], history: History, config: FreezingConfig) -> list[bool]:
    """Which units stay active from now on; counts the decision in ``history``, but does not put it in force."""
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


def _values(units: Sequence[Unit], history: History, config: FreezingConfig) -> list[float]:
    """One number a unit, at least 0 but for draws: of the least the unit is frozen first."""
    places = torch.arange(len(units))
    noise = gumbel(places, derive_key(config.seed, DRAW_STREAM, history.decisions)).tolist()
    if config.policy == "random":
        return noise
    values = relative(units, _shuffled(units, history.smooth, config) if config.shuffle else history.smooth)
    if config.policy == "gradient_norm":
        return [math.log(max(value, 1e-30)) + one for value, one in zip(values, noise, strict=True)]
    bonus = [1 + config.hysteresis if on else 1 - config.hysteresis for on in history.active]
    settled = [config.beta > 0 and left > 0 for left in history.resting]
    return [0.0 if rests else value * factor for value, factor, rests in zip(values, bonus, settled, strict=True)]


def relative(units: Sequence[Unit], values: Sequence[float]) -> list[float]:
    """Divided by the mean of the unit's kind."""
    sums: dict[str, list[float]] = {}
    for unit, value in zip(units, values, strict=True):
        sums.setdefault(unit.kind, []).append(value)
    means = {kind: sum(members) / len(members) for kind, members in sums.items()}
    return [value / means[unit.kind] if means[unit.kind] else 0.0 for unit, value in zip(units, values, strict=True)]


def _shuffled(units: Sequence[Unit], values: Sequence[float], config: FreezingConfig) -> list[float]:
    """The same permutation within each kind for the whole run."""
    result = list(values)
    for number, kind in enumerate(dict.fromkeys(unit.kind for unit in units)):
        places = [i for i, unit in enumerate(units) if unit.kind == kind]
        key = derive_key(config.seed, SHUFFLE_STREAM, number)
        for place, source in zip(places, permute(torch.arange(len(places)), len(places), key).tolist(), strict=True):
            result[place] = values[places[source]]
    return result


def _saved(units: Sequence[Unit], active: Sequence[bool]) -> float:
    return sum(saved_flops(units, active))


def _freeze(units: Sequence[Unit], active: list[bool], order: Sequence[float], target: float) -> list[bool]:
    """Freeze, by increasing ``order``, active units of kinds that keep another one, until ``target`` FLOPs are saved
    as nearly as whole units can."""
    active, left = list(active), dict[str, int]()
    for unit, on in zip(units, active, strict=True):
        left[unit.kind] = left.get(unit.kind, 0) + on
    saved, first = _saved(units, active), active.index(True)
    for i in sorted(range(len(units)), key=lambda i: (order[i], i)):
        if saved >= target:
            break
        if not active[i] or left[units[i].kind] < 2:
            continue
        # Below the first active module the input gradients go, too.
        above = active.index(True, i + 1) if i == first else i
        gain = units[i].weight + sum(unit.inputs for unit in units[i:above])
        if saved + gain - target > target - saved:
            continue
        active[i], saved = False, saved + gain
        first = above if i == first else first
        left[units[i].kind] -= 1
    return active


def _freeze_prefix(units: Sequence[Unit], values: Sequence[float], target: float) -> list[bool]:
    """The cheapest of all cuts, by the value that is frozen; among equals the lowest."""
    per_flop = [value / unit.weight if unit.weight else math.inf for value, unit in zip(values, units, strict=True)]
    best: tuple[tuple[float, float], list[bool]] | None = None
    for cut in range(len(units) - 1):
        below = [i >= cut for i in range(len(units))]
        over = _saved(units, below) - target
        before = _saved(units, [i >= cut - 1 for i in range(len(units))]) - target if cut else -target
        if over > 0 and over > -before:
            break  # the cut before was nearer, and higher ones save more still
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
    """All below one cut, the one that saves most nearly ``target`` FLOPs; among equals the lowest. The topmost unit
    stays active."""
    cuts = [[i >= cut for i in range(len(units))] for cut in range(len(units))]
    return min(cuts, key=lambda active: abs(_saved(units, active) - target))
