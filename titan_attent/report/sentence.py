"""One line per run: what it saved against the first run, or why no saving is reported (comparing.py has the rule).

The line ends with the other recorded settings in which the two runs differ, since these affect the saving as well.
"""

from titan_attent.report.comparing import Comparison, Saving, compare, cost_of
from titan_attent.report.costs import Costs
from titan_attent.report.runs import RunScalars
from titan_attent.report.saving import Measure, final, measures_of

NAMED_SETTINGS = {
    *("model", "global batch", "tokens of an example", "optimizer.lr", "debug.seed", "data.seed", "training.steps"),
    *("data.packing", "data.document_mask"),
}
"""Recorded settings that the line names if two runs differ in them."""


def conclusion(first: RunScalars, run: RunScalars) -> str:
    """What ``run`` saved against ``first`` at its final validation loss; for accuracies also both final values."""
    measures = measures_of([first, run])[::-1]
    comparisons = [(measure, compare(first, run, measure)) for measure in measures]
    ends = (_ends(first, run, measure) for measure in measures if measure.rises)
    text = "; ".join([*ends, *(_sentence(first, run, *one) for one in comparisons)])
    prepaid = Costs(run).prepaid_seconds
    if prepaid and any(one.own and not one.incomparable for _, one in comparisons):
        text += f"; its scorers took {prepaid:,.0f} s before the run"
    if any(one.savings for _, one in comparisons):
        text += _differences(first, run)
    return text


def saving_text(saved: float) -> str:
    return f"{saved:.1f}% saved" if saved > -0.05 else f"{-saved:.1f}% more"


def short(saving: Saving | None) -> str:
    """The saving for the table and the picture; empty where none is reported."""
    if saving is None:
        return ""
    return saving_text(saving.percent) if saving.is_beyond_noise else "within the noise"


def _ends(first: RunScalars, run: RunScalars, measure: Measure) -> str:
    ends = {one.path: final(one, measure) for one in (run, first)}
    values = (f"{path} at {'-' if end is None else measure.form.format(end)}" for path, end in ends.items())
    return f"final {measure.name}: {', '.join(values)}"


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


def _differences(first: RunScalars, run: RunScalars) -> str:
    own, base = run.record.setting, first.record.setting
    shared = [key for key in own if key in base]
    differing = [
        f"{key} ({own[key]}, {base[key]})" for key in shared if key in NAMED_SETTINGS and own[key] != base[key]
    ]
    if "data" in shared and own["data"] != base["data"]:
        differing.append("training data")
    text = f"; the runs also differ in {', '.join(differing)}" if differing else ""
    for one in (first, run):
        planned = one.record.setting.get("training.steps")
        if isinstance(planned, int) and one.last_step < planned:
            text += f"; {one.path} is at step {one.last_step:,} of {planned:,}"
    return text
