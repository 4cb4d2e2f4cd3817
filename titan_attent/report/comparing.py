"""What a run saved against the first one, in tokens and in FLOPs at equal quality; and where nothing can be said, why.

    saved = 1 - cost of the run / cost of the first run, where each was at the level at which the first run ended

It is said where the curves allow it, of tokens, of FLOPs and of seconds by itself:

1. Both validations measure the same: data, examples, seq_len, learner, as the runs told in teacher/data.json.
2. Neither run diverged: the last training loss and the last validation are finite, and the first run's end is not
   behind its best, the mean of three validations in a row, by more than the noise.
3. Both have five validations or more: fewer do not show their noise.
4. The run was at the level, with a validation before, and its own end is not behind it by more than the noise.
5. The difference is larger than the noise: if the level were easier or harder by twice the noise for either run, the
   same run would have needed less.
6. The curves do not cross afterwards: over the last quarter of the tokens that both have trained since the first of
   them was there, the run that needed less is not behind on average by more than twice the noise.
7. What scoring and scorers cost is known. Seconds compare on the same devices only: as told, or by the hosts.

"Behind" is a higher loss, or a lower accuracy. The noise is that of one validation, from both curves together; "by more
than the noise" is by twice that. Of a run that validates one data set over and over it is what training wobbles;
another seed may change more. What is charged says costs.py, how curves are smoothed curves.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from titan_attent.report import curves
from titan_attent.report.costs import Costs
from titan_attent.report.runs import TRAIN, RunScalars
from titan_attent.report.saving import Charge, Measure, Reached, curve_of, final, reach

SAVED: tuple[Charge, ...] = ("tokens", "FLOPs", "seconds")
"""What a run can save. Steps are no measure: they are of any size."""


@dataclass(frozen=True)
class Saving:
    """In percent of what the first run needed, negative where the run needed more; ``low`` and ``high``: at the levels
    that the noise allows."""

    percent: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Of a run with the first one.

    Attributes:
        target: the level at which the first run ended; None without validations.
        base, own: where the first run and the run were at it.
        apart: why the two do not compare at all.
        silent: why no saving is told, though ``own`` is there.
        is_near: whether the run ended at the target within the noise.
        savings: by what is saved; seconds and FLOPs only where they are in one unit.
    """

    target: float | None = None
    base: Reached | None = None
    own: Reached | None = None
    apart: str | None = None
    silent: str | None = None
    is_near: bool = False
    savings: dict[Charge, Saving] = field(default_factory=dict)

    def saving(self, charge: Charge) -> Saving | None:
        """None where none is told, or where it is within the noise."""
        found = self.savings.get(charge)
        return found if found is not None and found.is_beyond_noise else None


def compare(first: RunScalars, run: RunScalars, measure: Measure) -> Comparison:
    """By the rule of this module."""
    target = final(first, measure)
    base, own = reach(first, target, measure), reach(run, target, measure)
    if apart := _apart(first, run, measure):
        return Comparison(target, base, own, apart=apart)
    assert target is not None and base is not None
    worse = -1.0 if measure.rises else 1.0
    spread = curves.noise(curve_of(first, measure), curve_of(run, measure))
    band = 2 * (spread or 0.0)
    end = worse * (final(run, measure) or 0.0) - worse * target  # above 0: behind
    if own is None:
        return Comparison(target, base, is_near=spread is not None and end <= band)
    if silent := _too_few(first, run, measure, own):
        return Comparison(target, base, own, silent=silent)
    if end > band:
        shown = measure.form.format(final(run, measure))
        return Comparison(target, base, own, silent=f"the curves cross afterwards: {run.path} ended at {shown}")
    levels = (target, target + worse * band, target - worse * band)
    savings, unknown = dict[Charge, Saving](), Costs(first).unknown or Costs(run).unknown
    for charge in SAVED if unknown is None else SAVED[2:]:
        of_first, of_run = ([cost_of(one, reach(one, at, measure), charge) for at in levels] for one in (first, run))
        if charge in ("FLOPs", "seconds") and not _same_unit(first, run, charge):
            continue
        saving = _saving(of_first, of_run, end=cost_of(first, _end(first, measure), charge))
        if saving is not None:
            savings[charge] = saving
    if _cross(first, run, measure, (base, own), band=band):
        return Comparison(target, base, own, silent="the curves cross afterwards")
    return Comparison(target, base, own, silent=unknown, is_near=end <= band, savings=savings)


def cost_of(run: RunScalars, at: Reached | None, charge: Charge) -> float | None:
    """What counts: FLOPs in themselves where the run tells them, seconds with those of the scorers."""
    cost = None if at is None else at.cost(charge)
    if cost is None or charge not in ("FLOPs", "seconds"):
        return cost
    costs = Costs(run)
    return cost * (costs.flops_per_token or 1.0) if charge == "FLOPs" else cost + costs.prepaid_seconds


def _saving(first: Sequence[float | None], run: Sequence[float | None], *, end: float | None) -> Saving | None:
    """Of costs at the target, at an easier level and at a harder one, which the first run, if it never was there, would
    have reached behind its ``end`` at the earliest. None where a cost is not known, or nothing."""
    (base, base_easier, base_harder), (own, own_easier, own_harder) = first, run
    base_harder = base_harder or end
    if not base or not base_easier or not base_harder or own is None or own_easier is None:
        return None
    low = -math.inf if own_harder is None else 1 - own_harder / base_easier
    return Saving(100 * (1 - own / base), 100 * low, 100 * (1 - own_easier / base_harder))


def _apart(first: RunScalars, run: RunScalars, measure: Measure) -> str | None:
    """Rules 1 and 2, of both runs."""
    for one in (first, run):
        if measure.tag not in one.scalars:
            return f"{one.path} has no {measure.name}"
    for what in first.record.measured.keys() & run.record.measured.keys():
        mine, others = run.record.measured[what], first.record.measured[what]
        if mine != others and what == "validation data":
            return "their validation data differ"
        if mine != others:
            return (
                f"their validations measure another thing: {what} is {mine} of {run.path}, and {others} of {first.path}"
            )
    units = {one.loss_unit for one in (first, run)} - {None}
    if not measure.rises and len(units) > 1:
        return f"their losses are {' and '.join(sorted(map(str, units)))}"
    for one in (first, run):
        for tag, name in ((measure.tag, measure.name), (TRAIN, "training loss")):
            values = one.series(tag)[1]
            if len(values) and not np.isfinite(values[-1]):
                return f"{one.path} diverged: its last {name} is {values[-1]:g}"
    steps, values = curve_of(first, measure)
    finite = np.isfinite(values)
    band = 2 * (curves.noise((steps, values)) or 0.0)
    width = min(3, int(finite.sum()))
    means = np.convolve(values[finite], np.ones(width) / width, mode="valid")
    best, end = float(means.min()), curves.level(steps, values)
    if end is not None and end - best > band and len(means) > 1:
        where = int(steps[finite][np.argmin(means) + width // 2])
        sign = -1 if measure.rises else 1
        shown = [measure.form.format(sign * x) for x in (best, end)]
        return f"{first.path} was at {shown[0]} about step {where:,} and ended at {shown[1]}: it diverged or overfitted"
    return None


def _too_few(first: RunScalars, run: RunScalars, measure: Measure, own: Reached) -> str | None:
    """Rule 3, and of rule 4 that a validation came before."""
    for one in (first, run):
        num = int(np.isfinite(one.series(measure.tag)[1]).sum())
        if num == 1:
            return f"{one.path} has only one validation"
        if num < curves.LEAST:
            return f"{one.path} has {num} validations, which do not show their noise"
    return f"{run.path} was there at its first validation already" if own.between is None else None


def _same_unit(first: RunScalars, run: RunScalars, charge: Charge) -> bool:
    if charge == "seconds":
        devices = [one.record.devices or one.hosts for one in (first, run)]
        return devices[0] == devices[1]
    models = {one.record.setting.get("model") for one in (first, run)} - {None}
    known = [Costs(one).flops_per_token is not None for one in (first, run)]
    return all(known) or (not any(known) and len(models) < 2)


def _end(run: RunScalars, measure: Measure) -> Reached:
    """The last validation."""
    steps, _ = curve_of(run, measure)
    step, costs = int(steps[-1]), Costs(run)
    return Reached(step, costs.tokens(step), run.seconds[measure.tag][step], None, costs.charged_tokens(step))


def _cross(
    first: RunScalars, run: RunScalars, measure: Measure, reached: tuple[Reached, Reached], *, band: float
) -> bool:
    """Rule 6."""
    paces = [one.tokens_per_step or 0.0 for one in (first, run)]
    if not all(paces):
        return False
    ends = [pace * int(curve_of(one, measure)[0][-1]) for pace, one in zip(paces, (first, run), strict=True)]
    was = [pace * at.step for pace, at in zip(paces, reached, strict=True)]
    since, until = min(was), min(ends)
    if until <= since:
        return False
    where = np.linspace(since + 0.75 * (until - since), until, 32)
    losses = [curves.at(*curve_of(one, measure), where / pace) for pace, one in zip(paces, (first, run), strict=True)]
    behind = float(np.nanmean(losses[1] - losses[0])) * (1 if was[1] < was[0] else -1)
    return behind > band
