"""What a run saved against the first run, in tokens, FLOPs and seconds at equal quality, or why no saving is reported.

    saved = 1 - cost of the run / cost of the first run, each up to the level at which the first run ended

Savings in tokens, in FLOPs and in seconds are decided separately. A saving is reported where all of these hold:

1. Both validations measure the same: data, examples, seq_len and learner, as recorded in teacher/data.json.
2. Neither run diverged: the last training loss and the last validation are finite. The first run's end is not behind
   its best mean of three successive validations by more than the noise.
3. Both have five validations or more: fewer are not enough to estimate the noise.
4. The run reached the level after an earlier validation, and its end is not behind the level by more than the noise.
5. The difference is larger than the noise: if the level were easier or harder by twice the noise for either run, the
   same run would have needed less.
6. The curves do not cross afterwards. Take the tokens that both have trained since the earlier of them reached the
   level: over their last quarter, the run that needed less is not behind on average by more than twice the noise.
7. The cost of scoring and of the scorers is known. Seconds are compared only on the same devices, as recorded, or else
   on the same hosts.

"Behind" is a higher loss, or a lower accuracy. The noise is that of one validation, estimated from both curves; "by
more than the noise" means by more than twice that. A run validates on one data set again and again, so its noise is the
fluctuation of training; another seed may change more. costs.py defines the costs, curves.py how curves are smoothed.
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
"""The costs in which a saving is reported. Steps are not among them: runs differ in batch size."""


@dataclass(frozen=True)
class Saving:
    """A saving in percent of the cost of the first run, negative where the run cost more.

    Attributes:
        percent: at the level itself.
        low, high: the smallest and the largest saving at the levels that the noise allows.
    """

    percent: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """The comparison of a run with the first run.

    Attributes:
        target: the level at which the first run ended; None without validations.
        base, own: where the first run and the run reached it.
        incomparable: why the two cannot be compared at all.
        withheld: why no saving is reported although the run reached the target.
        is_near: whether the run ended at the target within the noise.
        savings: cost -> saving; seconds and FLOPs only where both runs have them in one unit.
    """

    target: float | None = None
    base: Reached | None = None
    own: Reached | None = None
    incomparable: str | None = None
    withheld: str | None = None
    is_near: bool = False
    savings: dict[Charge, Saving] = field(default_factory=dict)

    def saving(self, charge: Charge) -> Saving | None:
        """The saving in ``charge``; None where it is not reported, or is within the noise."""
        saving = self.savings.get(charge)
        return saving if saving is not None and saving.is_beyond_noise else None


def compare(first: RunScalars, run: RunScalars, measure: Measure) -> Comparison:
    """Compare a run with the first run by the rules of this module."""
    target = final(first, measure)
    base, own = reach(first, target, measure), reach(run, target, measure)
    if incomparable := _incomparable(first, run, measure):
        return Comparison(target, base, own, incomparable=incomparable)
    assert target is not None and base is not None
    worse = -1.0 if measure.rises else 1.0
    spread = curves.noise(curve_of(first, measure), curve_of(run, measure))
    band = 2 * (spread or 0.0)
    end = worse * (final(run, measure) or 0.0) - worse * target  # above 0: behind
    if own is None:
        return Comparison(target, base, is_near=spread is not None and end <= band)
    if withheld := _too_few(first, run, measure, own):
        return Comparison(target, base, own, withheld=withheld)
    if end > band:
        shown = measure.form.format(final(run, measure))
        return Comparison(target, base, own, withheld=f"the curves cross afterwards: {run.path} ended at {shown}")
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
        return Comparison(target, base, own, withheld="the curves cross afterwards")
    return Comparison(target, base, own, withheld=unknown, is_near=end <= band, savings=savings)


def cost_of(run: RunScalars, at: Reached | None, charge: Charge) -> float | None:
    """The cost to compare: FLOPs themselves where the run logged their rate; seconds with those of its scorers."""
    cost = None if at is None else at.cost(charge)
    if cost is None or charge not in ("FLOPs", "seconds"):
        return cost
    costs = Costs(run)
    return cost * (costs.flops_per_token or 1.0) if charge == "FLOPs" else cost + costs.prepaid_seconds


def _saving(first: Sequence[float | None], run: Sequence[float | None], *, end: float | None) -> Saving | None:
    """The saving from the costs of both runs at the target, at an easier level and at a harder level.

    If the first run never reached the harder level, its cost there is at least that at its ``end``, which is used.
    None where a cost is unknown, or where the first run's is 0."""
    (base, base_easier, base_harder), (own, own_easier, own_harder) = first, run
    base_harder = base_harder or end
    if not base or not base_easier or not base_harder or own is None or own_easier is None:
        return None
    low = -math.inf if own_harder is None else 1 - own_harder / base_easier
    return Saving(100 * (1 - own / base), 100 * low, 100 * (1 - own_easier / base_harder))


def _incomparable(first: RunScalars, run: RunScalars, measure: Measure) -> str | None:
    """Why rule 1 or 2 fails; None if both hold."""
    for one in (first, run):
        if measure.tag not in one.scalars:
            return f"{one.path} has no {measure.name}"
    if different := different_measurement(first, run, measure):
        return different
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
        return (
            f"{first.path} was at {shown[0]} around step {where:,} but ended at {shown[1]}: it diverged or overfitted"
        )
    return None


def different_measurement(first: RunScalars, run: RunScalars, measure: Measure) -> str | None:
    """What the validations of two runs measure differently, so that their values are not subtracted; None if nothing.

    With another tokenizer or length, the validation data differ as well; so the data are named last.
    """
    units = {one.loss_unit for one in (first, run)} - {None}
    if not measure.rises and len(units) > 1:
        return f"their losses are {' and '.join(sorted(map(str, units)))}"
    shared = first.record.measured.keys() & run.record.measured.keys()
    for name in sorted(shared, key=lambda name: (name == "validation data", name)):
        own, base = run.record.measured[name], first.record.measured[name]
        if own != base and name == "validation data":
            return "their validation data differ"
        if own != base:
            return f"their validations differ: {name} is {own} for {run.path} and {base} for {first.path}"
    return None


def _too_few(first: RunScalars, run: RunScalars, measure: Measure, own: Reached) -> str | None:
    """Why rule 3 fails, or the part of rule 4 on an earlier validation; None if both hold."""
    for one in (first, run):
        num = int(np.isfinite(one.series(measure.tag)[1]).sum())
        if num == 1:
            return f"{one.path} has only one validation"
        if num < curves.MIN_VALIDATIONS:
            return f"{one.path} has {num} validations, too few to estimate their noise"
    return f"{run.path} had already reached it at its first validation" if own.between is None else None


def _same_unit(first: RunScalars, run: RunScalars, charge: Charge) -> bool:
    if charge == "seconds":
        devices = [one.record.devices or one.hosts for one in (first, run)]
        return devices[0] == devices[1]
    models = {one.record.setting.get("model") for one in (first, run)} - {None}
    have_flops = [Costs(one).flops_per_token is not None for one in (first, run)]
    return all(have_flops) or (not any(have_flops) and len(models) < 2)


def _end(run: RunScalars, measure: Measure) -> Reached:
    """The step and costs of the last validation."""
    steps, _ = curve_of(run, measure)
    step, costs = int(steps[-1]), Costs(run)
    return Reached(step, costs.tokens(step), run.seconds[measure.tag][step], None, costs.charged_tokens(step))


def _cross(
    first: RunScalars, run: RunScalars, measure: Measure, reached: tuple[Reached, Reached], *, band: float
) -> bool:
    """Whether the curves cross afterwards (rule 6)."""
    paces = [one.tokens_per_step or 0.0 for one in (first, run)]
    if not all(paces):
        return False
    ends = [pace * int(curve_of(one, measure)[0][-1]) for pace, one in zip(paces, (first, run), strict=True)]
    reached_after = [pace * at.step for pace, at in zip(paces, reached, strict=True)]  # tokens
    since, until = min(reached_after), min(ends)
    if until <= since:
        return False
    where = np.linspace(since + 0.75 * (until - since), until, 32)
    losses = [curves.at(*curve_of(one, measure), where / pace) for pace, one in zip(paces, (first, run), strict=True)]
    behind = float(np.nanmean(losses[1] - losses[0])) * (1 if reached_after[1] < reached_after[0] else -1)
    return behind > band
