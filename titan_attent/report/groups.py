"""Several seeds of each setting: means with their 95% intervals, and differences to the first setting.

A difference is taken seed by seed if both settings have the same seeds, and otherwise between the means (Welch). Runs
whose validations measure something else are not subtracted.
"""

import math
import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

from titan_attent.report.comparing import compare, cost_of, different_measurement
from titan_attent.report.runs import RunScalars
from titan_attent.report.saving import Measure, best, final, measures_of
from titan_attent.report.settings import seed_of

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The 97.5th percentiles of Student's t with 1, 2, ... degrees of freedom."""


KINDS, REACHED = ("final", "best"), "reached the end of the first after, in its tokens"


class Mean(NamedTuple):
    """A mean and half of its 95% interval by Student's t, which is nan for one value."""

    mean: float
    half: float

    def text(self, form: str, *, sign: bool = False) -> str:
        """``1.234 ± 0.056``; without an interval only the mean."""
        shown = ("+" if sign and self.mean >= 0 else "") + form.format(self.mean)
        return shown if math.isnan(self.half) else f"{shown} ± {form.format(self.half)}"


def t_quantile(degrees: float) -> float:
    """The 97.5th percentile of Student's t; above 30 degrees of freedom by the Cornish-Fisher expansion."""
    if degrees < 1:
        return math.inf
    if degrees <= len(T_975):
        return T_975[int(degrees) - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of values of different seeds."""
    n = len(values)
    if n < 2:
        return Mean(statistics.fmean(values), math.nan)
    return Mean(statistics.fmean(values), t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n))


def difference(values: Sequence[float], base: Sequence[float], *, paired: bool) -> Mean:
    """The mean difference of ``values`` to ``base``, seed by seed if ``paired``."""
    if paired:
        return mean_of([a - b for a, b in zip(values, base, strict=True)])
    mean = statistics.fmean(values) - statistics.fmean(base)
    if min(len(values), len(base)) < 2:
        return Mean(mean, math.nan)
    parts = [(statistics.variance(one) / len(one), len(one) - 1) for one in (values, base)]
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / degrees for part, degrees in parts)
    return Mean(mean, t_quantile(total**2 / spread) * math.sqrt(total) if spread else 0.0)


def name_of(group: Sequence[RunScalars]) -> str:
    """The path of a single run, or the common beginning of the paths of several with a star."""
    paths = [str(run.path) for run in group]
    return paths[0] if len(paths) == 1 else os.path.commonprefix(paths) + "*"


def group_columns(groups: Sequence[Sequence[RunScalars]]) -> list[dict[str, str]]:
    """The columns of the table of groups: fact -> text."""
    measures = measures_of([run for group in groups for run in group])
    columns = []
    for group in groups:
        facts = {"setting": name_of(group), "runs": str(len(group))}
        for measure in measures:
            facts |= _facts(groups[0], group, measure)
        columns.append(facts)
    return columns


def group_sentences(columns: Sequence[dict[str, str]]) -> list[str]:
    """A sentence for each setting but the first, from the columns of the table of groups."""
    sentences = []
    for facts in columns[1:]:
        text = f"{facts['setting']} ({facts['runs']} runs) against {columns[0]['setting']}"
        for name in (name.removeprefix("final ") for name in facts if name.startswith("final ") and "," not in name):
            end, best_of = (f"{facts[f'{kind} {name}']} ({facts[f'{kind} {name}, difference']})" for kind in KINDS)
            text += f"; {name} at the end {end}, at best {best_of}"
        if facts.get(REACHED, "-") != "-":
            text += f"; it reached the end of the first after {facts[REACHED]} of its tokens"
        sentences.append(text)
    return sentences


def _facts(base: Sequence[RunScalars], group: Sequence[RunScalars], measure: Measure) -> dict[str, str]:
    facts: dict[str, str] = {}
    partners = _paired(base, group)
    for title, value in ((f"final {measure.name}", final), (f"best {measure.name}", best)):
        own = [value(run, measure) for run in group]
        finite = [x for x in own if _is_finite(x)]
        facts[title] = mean_of(finite).text(measure.form) if finite else "-"
        if finite and len(finite) < len(group):
            facts[title] += f" ({len(group) - len(finite)} without)"
        name = f"{title}, difference"
        if group is base:
            facts[name] = "-"
        elif different_measurement(base[0], group[0], measure):
            facts[name] = "not comparable"
        else:
            of_base = [value(run, measure) for run in partners or base]
            others = [x for x in of_base if _is_finite(x)]
            if partners:
                pairs = [(x, y) for x, y in zip(own, of_base, strict=True) if _is_finite(x) and _is_finite(y)]
                finite, others = [x for x, _ in pairs], [y for _, y in pairs]
            known = bool(finite and others)
            shown = difference(finite, others, paired=bool(partners)) if known else None
            facts[name] = shown.text(measure.form, sign=True) if shown else "-"
    if measure.rises:
        return facts
    shares = [] if group is base else _shares(partners or [base[0]] * len(group), group, measure)
    reached = [share for share in shares if share is not None]
    text = mean_of(reached).text("{:.1f}") + " %" if reached else "-"
    if shares and len(reached) < len(shares):
        text += f" ({len(shares) - len(reached)} did not)"
    return facts | {REACHED: text}


def _paired(base: Sequence[RunScalars], group: Sequence[RunScalars]) -> list[RunScalars] | None:
    """The run of ``base`` with the seed of each run of ``group``; None if one lacks it, or for a single run."""
    by_seed = {seed_of(run): run for run in base}
    if len(group) < 2 or any(seed_of(run) not in by_seed for run in group):
        return None
    return [by_seed[seed_of(run)] for run in group]


def _shares(base: Sequence[RunScalars], group: Sequence[RunScalars], measure: Measure) -> list[float | None]:
    """Tokens until each run reached the end of its base, in percent of those of the base; None if it did not."""
    shares: list[float | None] = []
    for first, run in zip(base, group, strict=True):
        one = compare(first, run, measure)
        costs = [cost_of(a, b, "tokens") for a, b in ((run, one.own), (first, one.base))]
        is_known = one.incomparable is None and costs[0] is not None and costs[1]
        shares.append(100 * costs[0] / costs[1] if is_known else None)  # type: ignore[operator]
    return shares


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
