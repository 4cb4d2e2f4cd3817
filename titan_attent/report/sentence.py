"""Two sentences per run: where it ended beside the first run, and what it saved or why no saving is reported.

comparing.py has the rule. The table has the settings in which the runs differ, since these affect the saving as well.
"""

import math
from collections.abc import Callable

from titan_attent.report.comparing import Comparison, Saving, compare, cost_of, different_measurement
from titan_attent.report.costs import Costs
from titan_attent.report.runs import RunScalars
from titan_attent.report.saving import Measure, best, final, measures_of


def conclusion(first: RunScalars, run: RunScalars) -> str:
    """What ``run`` saved against ``first`` at its final validation loss, and at its final accuracy."""
    measures = measures_of([first, run])[::-1]
    text = "; ".join(_sentence(first, run, measure, compare(first, run, measure)) for measure in measures)
    for one in (first, run):
        planned = one.record.setting.get("training.steps")
        if isinstance(planned, int) and one.last_step < planned:
            text += f"; {one.path} is at step {one.last_step:,} of {planned:,}"
    return text


def ends(first: RunScalars, run: RunScalars) -> list[str]:
    """A sentence per measure: the end of a run beside that of the first, and its best beside the best of the first."""
    return [text for measure in measures_of([first, run]) if (text := _ends(first, run, measure))]


def _ends(first: RunScalars, run: RunScalars, measure: Measure) -> str:
    own, base = final(run, measure), final(first, measure)
    own_best, base_best = best(run, measure), best(first, measure)
    if own is None or base is None or own_best is None or base_best is None:
        return ""
    shown, name = measure.form.format, measure.name
    if different_measurement(first, run, measure):  # the conclusion says what
        return f"{run.path} ended at a {name} of {shown(own)}, {first.path} at {shown(base)}: not comparable"
    return (
        f"{run.path} ended at a {name} of {shown(own)}, {_than(own, base, shown)} {first.path} ({shown(base)}); its "
        f"best is {shown(own_best)}, {_than(own_best, base_best, shown)} the best of {first.path} ({shown(base_best)})"
    )


def _than(own: float, base: float, shown: Callable[[float], str]) -> str:
    if not math.isfinite(own - base):
        return "against"
    return "equal to" if own == base else f"{shown(abs(own - base))} {'below' if own < base else 'above'}"


def saving_text(saved: float) -> str:
    return f"{saved:.1f}% saved" if saved > -0.05 else f"{-saved:.1f}% more"


def short(saving: Saving | None) -> str:
    """The saving for the table and the picture; empty where none is reported."""
    if saving is None:
        return ""
    return saving_text(saving.percent) if saving.is_beyond_noise else "within the noise"


def _sentence(first: RunScalars, run: RunScalars, measure: Measure, comparison: Comparison) -> str:
    if comparison.target is None:
        return f"{first.path} has no final {measure.name} to compare with"
    if comparison.incomparable:
        return f"{run.path} cannot be compared with {first.path} by the {measure.name}: {comparison.incomparable}"
    assert comparison.base is not None
    target = f"the final {measure.name} of {first.path}, {measure.form.format(comparison.target)}"
    if comparison.target != first.series(measure.tag)[1][-1]:
        target += " (smoothed)"
    if comparison.own is None:
        near = f", but ended within its noise, at {measure.form.format(final(run, measure))}"
        return f"{run.path} did not reach {target}" + near * comparison.is_near
    own, base = (cost_of(one, at, "tokens") for one, at in ((run, comparison.own), (first, comparison.base)))
    text = f"{run.path} reached {target}"
    if own is None or base is None:
        text += f", after {comparison.own.step:,.0f} steps instead of {comparison.base.step:,.0f}"
    else:
        text += f", after {own:,.0f} tokens instead of {base:,.0f}"
    if comparison.withheld:
        seconds = comparison.savings.get("seconds")
        text += f": {_saving_in(seconds, 'seconds')}" if seconds else ""
        other = "saving in tokens or FLOPs" if seconds else "saving"
        return f"{text}; no {other} is reported: {comparison.withheld}"
    tokens, flops = comparison.savings["tokens"], comparison.savings.get("FLOPs")
    charged = "FLOPs with scoring" if any(Costs(one).has_scoring for one in (first, run)) else "FLOPs"
    if flops is None:
        return f"{text}: {_saving_in(tokens, 'tokens')}; their FLOPs cannot be compared"
    if abs(flops.percent - tokens.percent) < 0.05:
        return f"{text}: {_saving_in(tokens, f'tokens and {charged}')}"
    return f"{text}: {_saving_in(tokens, 'tokens')}, {_saving_in(flops, charged)}"


def _saving_in(saving: Saving, cost: str) -> str:
    if saving.is_beyond_noise:
        return f"{saving_text(saving.percent)} in {cost}"
    return f"no difference in {cost} beyond the noise of the validations"
