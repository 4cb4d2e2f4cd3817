"""The table: one line per fact, one column per run."""

from collections.abc import Sequence

import numpy as np

from titan_attent.report.comparing import compare, cost_of
from titan_attent.report.costs import Costs
from titan_attent.report.runs import (
    BITS,
    EXACT,
    IMAGE_SPEED,
    LOSSES_OF_INPUTS,
    MATCHES_OF_INPUTS,
    SPEED,
    TOKEN_ACCURACY,
    TOP5,
    TRAIN,
    VALIDATION,
    WALL,
    Axis,
    RunScalars,
)
from titan_attent.report.saving import LOSS, MATCH, TOP1, Charge, Measure, measures_of
from titan_attent.report.sentence import conclusion, short
from titan_attent.report.settings import differing_settings
from titan_attent.report.systems import families, prefixes, units

__all__ = ["ACCOUNTS", "AXES", "cells", "conclusion", "shown_members", "summarize", "table", "with_unit"]

ACCOUNTS = tuple(
    f"ledger/{name}_seconds" for name in ("train", "load", "validate", "save", "score", "select", "exchange", "probe")
)
"""The ledger accounts in the order of the table; those of external systems come after them."""
# The tags in the order of the table; further teacher/* and ledger/* tags come after them.
ORDER = (
    *("teacher/round", "teacher/ratio", "teacher/selected", "teacher/importance_mean", "teacher/importance_p99"),
    "teacher/repeats",
    *("teacher/effective_sample_size", "teacher/never_selected", "teacher/overlap", "teacher/max_weight"),
    *("teacher/loss_age", "teacher/quarantined", "teacher/nonfinite", "teacher/fallback"),
    *("ledger/examples_trained", "ledger/examples_covered", "ledger/examples_scored", "ledger/examples_skipped"),
    *("ledger/skipped_share", "ledger/break_even_share", "ledger/tokens_covered_per_second"),
    *("ledger/overhead_percent", *ACCOUNTS, WALL),
)
# Tags that are in the table even without a value.
ALWAYS = {
    *(
        *(tag for tag in ORDER[:10] if tag != "teacher/repeats"),
        "ledger/select_seconds",
        "ledger/exchange_seconds",
        "ledger/overhead_percent",
    ),
    *("ledger/examples_trained", "ledger/examples_covered", "ledger/tokens_covered_per_second"),
}
BETWEEN = "between validations at"
REACHED = ("reached at step", "reached after tokens", "reached after FLOPs", "reached after seconds")
CHARGES: tuple[Charge, ...] = ("step", "tokens", "FLOPs", "seconds")
AXES: tuple[Axis, ...] = ("step", "tokens", "seconds")
SHOWN_MEMBERS = 8
"""Tags shown of a family, which has one tag for each of many things, such as data sources."""


def summarize(run: RunScalars, runs: Sequence[RunScalars] = ()) -> dict[str, str]:
    """The table's column of one run: fact -> text, "-" where the run did not log it; files relative to the run.

    ``runs``: all runs that are compared; the first is the one that the others are compared with.
    """

    compared = runs or [run]
    unit_of, position = units(compared), next(i for i, one in enumerate(compared) if one is run)

    def last(tag: str, form: str = "") -> str:
        steps, values = run.series(tag)
        if not len(steps):
            return "-"
        text = form.format(values[-1]) if form else with_unit(tag, values[-1], unit=unit_of.get(tag, ""))
        if tag in ACCOUNTS and WALL in run.scalars and (wall := run.series(WALL)[1][-1]) > 0:
            text += f" ({100 * values[-1] / wall:.1f}%)"
        return text + ("" if steps[-1] >= run.last_step else f" at step {steps[-1]:,}")

    def best(measure: Measure) -> str:
        validated = {step: x for step, x in run.scalars.get(measure.tag, {}).items() if not np.isnan(x)}
        if not validated:
            return "-"
        step = (max if measure.rises else min)(validated, key=lambda step: validated[step])
        return f"{measure.form.format(validated[step])} at step {step:,}"

    def median(tag: str) -> str:
        speeds = run.series(tag)[1]
        return f"{np.median(speeds):,.0f}" if len(speeds) else "-"

    resumes = len(run.session_starts) - 1
    of_sources = sorted(tag for tag in run.scalars if tag.startswith(f"{EXACT}/"))
    sets = sorted(tag.removeprefix(f"{VALIDATION}/") for tag in run.scalars if tag.startswith(f"{VALIDATION}/"))
    minutes, seconds = divmod(round(run.wall_seconds), 60)
    logged = {tag for tag in run.scalars.keys() | run.decided.keys() if tag.startswith(prefixes(compared))}
    many = families(compared, maps=False) + families(compared, maps=True)
    logged -= {tag for tag in logged if tag.startswith(many)}
    tags = [*(tag for tag in ORDER if tag in logged | ALWAYS), *sorted(logged.difference(ORDER))]
    checkpoints = [file.parent.name for file in run.path.glob("checkpoint/step-*/.metadata")]
    newest = max((name for name in checkpoints if name[5:].isdecimal()), key=lambda name: int(name[5:]), default=None)
    return {
        "run": str(run.path),
        **{name: values[position] for name, values in differing_settings(compared).items()},
        "steps": f"{run.last_step:,}" + (f" ({resumes} resume{'s' * (resumes > 1)})" if resumes else ""),
        "tokens": f"{run.last_step * run.tokens_per_step:,.0f}" if run.tokens_per_step else "-",
        "train loss": last(TRAIN, LOSS.form),
        LOSS.name: last(LOSS.tag, LOSS.form),
        f"best {LOSS.name}": best(LOSS),
        **{f"{LOSS.name}, {name}": last(f"{VALIDATION}/{name}", LOSS.form) for name in sets},
        **({"bits per byte": last(BITS, LOSS.form)} if BITS in run.scalars else {}),
        **{f"bits per byte, {name}": last(f"{BITS}/{name}", LOSS.form) for name in sets},
        **({TOP1.name: last(TOP1.tag, TOP1.form), f"best {TOP1.name}": best(TOP1)} if TOP1.tag in run.scalars else {}),
        **({"top-5 accuracy": last(TOP5, TOP1.form)} if TOP5 in run.scalars else {}),
        **({MATCH.name: last(EXACT, MATCH.form), f"best {MATCH.name}": best(MATCH)} if EXACT in run.scalars else {}),
        **{f"{MATCH.name}, {tag.rsplit('/')[-1]}": last(tag, MATCH.form) for tag in of_sources},
        **({"token accuracy": last(TOKEN_ACCURACY, MATCH.form)} if TOKEN_ACCURACY in run.scalars else {}),
        **{name: last(tag, MATCH.form) for tag, name in MATCHES_OF_INPUTS.items() if tag in run.scalars},
        **{name: last(tag, LOSS.form) for tag, name in LOSSES_OF_INPUTS.items() if tag in run.scalars},
        "tokens/s/device": median(SPEED),
        **({"images/s/device": median(IMAGE_SPEED)} if run.is_of_images else {}),
        "wall time": f"{minutes // 60} h {minutes % 60:02} min {seconds:02} s",
        **(_saving(run, runs) if len(runs) > 1 else {}),
        **{tag: last(tag) for tag in tags},
        **_family_facts(run, compared),
        "checkpoint": f"checkpoint/{newest}" if newest else "-",
        "tensorboard": "tb",
        "trace": "teacher/trace.jsonl" if (run.path / "teacher" / "trace.jsonl").is_file() else "-",
    }


def with_unit(tag: str, value: float, *, unit: str = "") -> str:
    """A scalar with its unit: seconds, percent or a share by the end of its tag, or else the ``unit`` of its system."""
    name = tag.split("/")[1]
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if name.endswith("_seconds"):
        return f"{number} s" if value >= 1e-3 or value == 0 else "under 1 ms"
    if name.endswith("_percent"):
        return f"{value:.3g}%"
    if unit == "share" or name.endswith("_share"):
        return f"{100 * value:.2f}%"
    return f"{number} {unit}" if unit else number


def _saving(run: RunScalars, runs: Sequence[RunScalars]) -> dict[str, str]:
    """The lines on reaching the level at which the first run ended; see saving.py."""
    facts = _saving_in(run, runs[0], LOSS)
    for measure, prefix in ((TOP1, "accuracy "), (MATCH, "exact match ")):
        if measure in measures_of(runs):
            facts |= _saving_in(run, runs[0], measure, prefix=prefix)
    return facts


def _saving_in(run: RunScalars, first: RunScalars, measure: Measure, *, prefix: str = "") -> dict[str, str]:
    """The lines for one measure. ``prefix`` begins all lines but the first."""
    target, (at_step, *_), between = f"first run's final {measure.name}", REACHED, prefix + BETWEEN
    charges = {prefix + name: charge for name, charge in zip(REACHED, CHARGES, strict=True)}
    comparison = compare(first, run, measure)
    facts = {target: "-"} | dict.fromkeys((*charges, between), "-")
    if comparison.target is None:
        return facts | {target: f"-: it has no {measure.name}"}
    if comparison.base is None:
        return facts | {target: f"-: it is {comparison.target}"}
    facts[target] = measure.form.format(comparison.target)
    own = comparison.own
    if comparison.incomparable:
        return facts
    if own is None:
        return facts | {prefix + at_step: "not reached"}
    for fact, charge in charges.items():
        cost = own.cost(charge) if charge == "seconds" else cost_of(run, own, charge)
        if cost is None or (charge == "FLOPs" and not Costs(run).flops_per_token):
            continue
        number = f"{cost:.3g}" if charge == "FLOPs" else f"{cost:,.{1 - (charge == 'tokens')}f}".removesuffix(".0")
        facts[fact] = ("" if own.between else "at most ") + number
        if run is not first and (saved := short(comparison.savings.get(charge))):
            facts[fact] += f" ({saved})"
    facts[between] = "{:,} and {:,}".format(*own.between) if own.between else f"at or before {own.step:,.0f}"
    return facts


def shown_members(runs: Sequence[RunScalars], family: str) -> tuple[list[str], list[str]]:
    """(tags of a family to show, the others), both by falling mean.

    With more than :data:`SHOWN_MEMBERS` tags, those with the largest and the smallest means are shown.
    """
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
    for family in families(runs, maps=False):
        shown, rest = shown_members(runs, family)
        means = run.family_means(family)
        facts |= {family + member: f"{100 * means[member]:.2f}%" if member in means else "-" for member in shown}
        others = [means[member] for member in rest if member in means]
        if rest:
            mean = f"{100 * sum(others) / len(others):.2f}%" if others else "-"
            facts[f"{family}* ({len(rest)} others)"] = mean
    return facts


def cells(columns: Sequence[dict[str, str]]) -> list[list[str]]:
    """The rows of the table: one per fact, one column per run. A fact of only some runs keeps its position in them."""
    facts: list[str] = []
    for column in columns:
        i = 0
        for fact in column:
            if fact not in facts:
                facts.insert(i, fact)
            i = facts.index(fact) + 1
    return [[fact, *(column.get(fact, "-") for column in columns)] for fact in facts]


def table(columns: Sequence[dict[str, str]]) -> str:
    """The table as text."""
    rows = cells(columns)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
