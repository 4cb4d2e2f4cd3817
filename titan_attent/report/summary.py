"""The table: one line a fact, one column a run; and what a comparison of several runs says of the teacher's saving."""

from collections.abc import Sequence

import numpy as np

from titan_attent.report.runs import PREFIXES, SPEED, TRAIN, VALIDATION, WALL, Axis, RunScalars
from titan_attent.report.saving import reach, saved_percent, target_loss
from titan_attent.systems import SYSTEMS

ACCOUNTS = tuple(
    f"ledger/{name}_seconds" for name in ("train", "load", "validate", "save", "score", "select", "exchange", "probe")
)
# The order of the table; further teacher/* and ledger/* tags come after them.
ORDER = (
    *("teacher/round", "teacher/ratio", "teacher/selected", "teacher/importance_mean", "teacher/importance_p99"),
    *("teacher/effective_sample_size", "teacher/never_selected", "teacher/overlap", "teacher/max_weight"),
    *("teacher/loss_age", "teacher/quarantined", "teacher/nonfinite", "teacher/fallback"),
    *("ledger/examples_trained", "ledger/examples_covered", "ledger/examples_scored", "ledger/examples_skipped"),
    *("ledger/skipped_share", "ledger/break_even_share", "ledger/tokens_covered_per_second"),
    *("ledger/overhead_percent", *ACCOUNTS, WALL),
)
# In the table with or without a value.
ALWAYS = {
    *(*ORDER[:9], "ledger/select_seconds", "ledger/exchange_seconds", "ledger/overhead_percent"),
    *("ledger/examples_trained", "ledger/examples_covered", "ledger/tokens_covered_per_second"),
}
TARGET, BETWEEN = "first run's final validation loss", "between validations at"
REACHED = ("reached at step", "reached after tokens", "reached after seconds")
AXES: tuple[Axis, ...] = ("step", "tokens", "seconds")
SHARES = {"ratio", "effective_sample_size", "never_selected", "overlap"}
_PANELS = [panel for system in SYSTEMS for panel in system.panels if panel.family]
FAMILIES = tuple(str(panel.family) for panel in _PANELS if not panel.map)
MAPS = tuple(str(panel.family) for panel in _PANELS if panel.map)
"""Families that the picture alone shows."""
SHOWN_MEMBERS = 8
"""Of a family of tags, one for each of many things such as data sources."""


def summarize(run: RunScalars, runs: Sequence[RunScalars] = ()) -> dict[str, str]:
    """The table's column of one run: fact -> text, "-" where the run did not log it; files relative to the run.

    ``runs``: all that are compared, the first being what the others are measured by.
    """

    def last(tag: str, form: str = "") -> str:
        steps, values = run.series(tag)
        if not len(steps):
            return "-"
        text = form.format(values[-1]) if form else with_unit(tag, values[-1])
        if tag in ACCOUNTS and WALL in run.scalars and (wall := run.series(WALL)[1][-1]) > 0:
            text += f" ({100 * values[-1] / wall:.1f}%)"
        return text + ("" if steps[-1] >= run.last_step else f" at step {steps[-1]:,}")

    validated = [(value, step) for step, value in run.scalars.get(VALIDATION, {}).items() if value == value]  # no nan
    speeds = run.series(SPEED)[1]
    resumes = len(run.session_starts) - 1
    minutes, seconds = divmod(round(run.wall_seconds), 60)
    logged = {tag for tag in run.scalars.keys() | run.decided.keys() if tag.startswith(PREFIXES)}
    logged -= {tag for tag in logged if tag.startswith(FAMILIES + MAPS)}
    tags = [*(tag for tag in ORDER if tag in logged | ALWAYS), *sorted(logged.difference(ORDER))]
    checkpoints = [file.parent.name for file in run.path.glob("checkpoint/step-*/.metadata")]
    newest = max((name for name in checkpoints if name[5:].isdecimal()), key=lambda name: int(name[5:]), default=None)
    return {
        "run": str(run.path),
        "steps": f"{run.last_step:,}" + (f" ({resumes} resume{'s' * (resumes > 1)})" if resumes else ""),
        "tokens": f"{run.last_step * run.tokens_per_step:,.0f}" if run.tokens_per_step else "-",
        "train loss": last(TRAIN, "{:.4f}"),
        "validation loss": last(VALIDATION, "{:.4f}"),
        "best validation loss": "{:.4f} at step {:,}".format(*min(validated)) if validated else "-",
        "tokens/s/device": f"{np.median(speeds):,.0f}" if len(speeds) else "-",
        "wall time": f"{minutes // 60} h {minutes % 60:02} min {seconds:02} s",
        **(_saving(run, runs[0]) if len(runs) > 1 else {}),
        **{tag: last(tag) for tag in tags},
        **_family_facts(run, runs or [run]),
        "checkpoint": f"checkpoint/{newest}" if newest else "-",
        "tensorboard": "tb",
        "trace": "teacher/trace.jsonl" if (run.path / "teacher" / "trace.jsonl").is_file() else "-",
    }


def with_unit(tag: str, value: float) -> str:
    """A scalar as its tag means it: seconds, percent, a share of the data, steps, or a plain number."""
    name = tag.split("/")[1]
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if name.endswith("_seconds"):
        return f"{number} s" if value >= 1e-3 or value == 0 else "under 1 ms"
    if name.endswith("_percent"):
        return f"{value:.3g}%"
    if name in SHARES or name.endswith("_share") or tag.startswith(FAMILIES):
        return f"{100 * value:.2f}%"
    return number + (" steps" if name == "loss_age" else "")


def _saving(run: RunScalars, first: RunScalars) -> dict[str, str]:
    """The lines on the first run's final validation loss; see saving.py."""
    target, axes = target_loss(first), dict(zip(REACHED, AXES, strict=True))
    facts = {TARGET: "-"} | dict.fromkeys((*axes, BETWEEN), "-")
    if target is None:
        return facts | {TARGET: "-: it has no validation loss"}
    own, base = reach(run, target), reach(first, target)
    if base is None:
        return facts | {TARGET: f"-: it is {target}"}
    facts[TARGET] = f"{target:.4f}"
    if own is None:
        return facts | ({REACHED[0]: "not reached"} if VALIDATION in run.scalars else {})
    for fact, axis in axes.items():
        cost, saved = own.cost(axis), saved_percent(own, base, axis)
        if cost is not None:
            facts[fact] = ("" if own.between else "at most ") + f"{cost:,.{1 - (axis == 'tokens')}f}".removesuffix(".0")
            if run is not first and saved is not None:
                facts[fact] += f" ({'' if own.between else 'at least '}{saving_text(saved)})"
    facts[BETWEEN] = "{:,} and {:,}".format(*own.between) if own.between else f"the first at {own.step:,.0f}"
    return facts


def conclusion(first: RunScalars, run: RunScalars) -> str:
    """One line: what ``run`` needed to reach the final validation loss of ``first``."""
    target = target_loss(first)
    base, own = reach(first, target), reach(run, target)
    if target is None or base is None:
        return f"{first.path} has no final validation loss to compare with"
    if own is None:
        return f"{run.path} did not reach the final validation loss of {first.path}, {target:.4f}"
    saved = saved_percent(own, base, "step")
    text = (
        f"{run.path} reached the final validation loss of {first.path}, {target:.4f}, after {own.step:,.0f} steps "
        f"instead of {base.step:,.0f}"
    )
    text += "" if saved is None else f": {saving_text(saved)}"
    steps, prepaid = run.series("ledger/prepaid_seconds")
    return text + (f"; its scorers took {prepaid[-1]:,.0f} s before" if len(steps) and prepaid[-1] else "")


def saving_text(saved: float) -> str:
    return f"{saved:.1f}% saved" if saved > -0.05 else f"{-saved:.1f}% more"


def shown_members(runs: Sequence[RunScalars], family: str) -> tuple[list[str], list[str]]:
    """Which tags of a family to show, the largest mean first, and the rest. Of many tags those with the largest and
    the smallest means are shown."""
    means: dict[str, list[float]] = {}
    for run in runs:
        for member, mean in run.family_means(family).items():
            means.setdefault(member, []).append(mean)
    ranked = sorted(means, key=lambda member: (-sum(means[member]) / len(means[member]), member))
    if len(ranked) <= SHOWN_MEMBERS:
        return ranked, []
    half = SHOWN_MEMBERS // 2
    return ranked[:half] + ranked[-half:], ranked[half:-half]


def _family_facts(run: RunScalars, runs: Sequence[RunScalars]) -> dict[str, str]:
    facts: dict[str, str] = {}
    for family in FAMILIES:
        shown, rest = shown_members(runs, family)
        means = run.family_means(family)
        facts |= {family + member: f"{100 * means[member]:.2f}%" if member in means else "-" for member in shown}
        others = [means[member] for member in rest if member in means]
        if rest:
            mean = f"{100 * sum(others) / len(others):.2f}%" if others else "-"
            facts[f"{family}* ({len(rest)} others)"] = mean
    return facts


def table(columns: Sequence[dict[str, str]]) -> str:
    """One line a fact, one column a run; a fact that one run alone has stands where that run has it."""
    facts: list[str] = []
    for column in columns:
        at = 0
        for fact in column:
            if fact not in facts:
                facts.insert(at, fact)
            at = facts.index(fact) + 1
    cells = [facts, *([column.get(fact, "-") for fact in facts] for column in columns)]
    widths = [max(map(len, column)) for column in cells]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*cells, strict=True))
