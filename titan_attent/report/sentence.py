"""One line a run: what it saved against the first run, or why that is not told (comparing.py has the rule).

Whatever else the two runs differ in, as far as they told it, is named behind it: what a run saved is the sum of it all.
"""

from titan_attent.report.comparing import Comparison, Saving, compare, cost_of
from titan_attent.report.costs import Costs
from titan_attent.report.runs import RunScalars
from titan_attent.report.saving import Measure, final, measures_of

APART = {"model", "global batch", "tokens of an example", "optimizer.lr", "debug.seed", "data.seed", "training.steps"}
"""Of what runs tell of themselves: named where two differ in it."""


def conclusion(first: RunScalars, run: RunScalars) -> str:
    """What ``run`` saved against ``first`` at the final validation loss of ``first``; of images their ends, too."""
    measures = measures_of([first, run])[::-1]
    found = [(measure, compare(first, run, measure)) for measure in measures]
    ends = (_ends(first, run, measure) for measure in measures if measure.rises)
    told = "; ".join([*ends, *(_sentence(first, run, *one) for one in found)])
    prepaid = Costs(run).prepaid_seconds
    if prepaid and any(one.own and not one.apart for _, one in found):
        told += f"; its scorers took {prepaid:,.0f} s before"
    if any(one.savings for _, one in found):
        told += _apart(first, run)
    return told


def saving_text(saved: float) -> str:
    return f"{saved:.1f}% saved" if saved > -0.05 else f"{-saved:.1f}% more"


def short(saving: Saving | None) -> str:
    """For the table and the picture; empty where nothing is told."""
    if saving is None:
        return ""
    return saving_text(saving.percent) if saving.is_beyond_noise else "within the noise"


def _ends(first: RunScalars, run: RunScalars, measure: Measure) -> str:
    ends = {one.path: final(one, measure) for one in (run, first)}
    told = (f"{path} at {'-' if end is None else measure.form.format(end)}" for path, end in ends.items())
    return f"final {measure.name}: {', '.join(told)}"


def _sentence(first: RunScalars, run: RunScalars, measure: Measure, found: Comparison) -> str:
    if found.target is None:
        return f"{first.path} has no final {measure.name} to compare with"
    if found.apart:
        return f"{run.path} cannot be compared with {first.path} by the {measure.name}: {found.apart}"
    assert found.base is not None
    wanted = f"the final {measure.name} of {first.path}, {measure.form.format(found.target)}"
    if found.target != first.series(measure.tag)[1][-1]:
        wanted += " (smoothed)"
    if found.own is None:
        near = f", but ended at {measure.form.format(final(run, measure))}, which is within the noise of it"
        return f"{run.path} did not reach {wanted}" + near * found.is_near
    own, base = (cost_of(one, at, "tokens") for one, at in ((run, found.own), (first, found.base)))
    text = f"{run.path} reached {wanted}"
    if own is None or base is None:
        text += f", after {found.own.step:,.0f} steps instead of {found.base.step:,.0f}"
    else:
        text += f", after {own:,.0f} tokens instead of {base:,.0f}"
    if found.silent:
        seconds = found.savings.get("seconds")
        text += f": in seconds {_full(seconds)}" if seconds else ""
        return f"{text}; no saving{' beside' * bool(seconds)} is told: {found.silent}"
    tokens, flops = found.savings["tokens"], found.savings.get("FLOPs")
    charged = "FLOPs with scoring" if any(Costs(one).has_scoring for one in (first, run)) else "FLOPs"
    if flops is None:
        return f"{text}: in tokens {_full(tokens)}; their FLOPs do not compare"
    if abs(flops.percent - tokens.percent) < 0.05:
        return f"{text}: in tokens and {charged} {_full(tokens)}"
    return f"{text}: in tokens {_full(tokens)}, in {charged} {_full(flops)}"


def _full(saving: Saving) -> str:
    if saving.is_beyond_noise:
        return saving_text(saving.percent)
    return "no difference beyond the noise of the validations"


def _apart(first: RunScalars, run: RunScalars) -> str:
    mine, others = run.record.setting, first.record.setting
    told = [key for key in mine if key in others]
    differing = [f"{key} ({mine[key]}, {others[key]})" for key in told if key in APART and mine[key] != others[key]]
    if "data" in told and mine["data"] != others["data"]:
        differing.append("training data")
    text = f"; the two differ in {', '.join(differing)}, too" if differing else ""
    for one in (first, run):
        planned = one.record.setting.get("training.steps")
        if isinstance(planned, int) and one.last_step < planned:
            text += f"; {one.path} is at step {one.last_step:,} of {planned:,}"
    return text
