"""The goals of the single-pass experiment, with a verdict for each, from charged results (numbers.py)."""

import math
from collections.abc import Sequence

from benchmarks.common.intervals import half_width, interval
from benchmarks.common.tables import markdown, mean
from benchmarks.single_pass.numbers import (
    Losses,
    Result,
    all_losses,
    columns_of,
    compute_of,
    corpus_of,
    paired,
)
from benchmarks.single_pass.rules import RULES

SAVINGS = (
    *((f"30% less compute on {corpus}, one run", corpus, 0.7, 1) for corpus in ("junk", "near_duplicates", "target")),
    ("10% less compute on web, one run", "web", 0.9, 1),
    *(
        (f"45% less compute on {corpus}, of five runs", corpus, 0.55, 5)
        for corpus in ("junk", "near_duplicates", "target")
    ),
)
"""(goal, corpus, share of uniform's compute, number of runs that share the scorers)."""
ROUNDING = 0.005
"""Tolerance of the compute: 0.705 still meets 0.7."""
UNHARMED = ("clean", "minority: code", "minority: russian")
HARMLESS = 0.005
"""Largest mean difference in nats per token that counts as no harm."""
CHEAP = 0.02
"""Largest cost of the scorers that counts as no harm, as a share of a full run's steps."""


def make_goals(results: Sequence[Result]) -> str:
    """Markdown: for each goal, the measured numbers and a verdict.

    A saving is judged by the rule with the most compute among those allowed. It is met where the whole 95% interval of
    the difference to uniform's final loss is at or below 0, and "likely" where only the mean is. No harm is met where
    the mean difference at equal steps and the cost of the scorers are both small enough.
    """
    losses = all_losses(results)
    lines = [["goal", "by", "compute", "of that scorers", "difference to uniform", "verdict"], ["---"] * 6]
    lines += [row for goal in SAVINGS if (row := saving(results, losses, *goal))]
    harmless = [(column, "difference") for column in UNHARMED]
    harmless += [(column, "attainment") for column in columns_of(losses)]  # it needs no trusted text anywhere
    lines += [row for column, rule in harmless if (row := no_harm(results, losses, column, rule))]
    return markdown(lines)


def saving(results: Sequence[Result], losses: Losses, goal: str, corpus: str, share: float, runs: int) -> list[str]:
    """The row of a saving; empty where no rule was run with so little compute."""
    costs = {rule: compute_of(results, rule, corpus, runs=runs) for rule in RULES if RULES[rule].scorers}
    allowed = {
        rule: cost
        for rule, cost in costs.items()
        if cost is not None and cost[0] <= share + ROUNDING and paired(losses, rule, corpus)
    }
    if not allowed:
        return []
    rule = max(allowed, key=lambda name: allowed[name])
    differences = paired(losses, rule, corpus)
    width = half_width(differences)
    certain = not math.isnan(width) and mean(differences) + width <= 0
    verdict = "met" if certain else "likely" if mean(differences) <= 0 else "missed"
    return [goal, rule, *(f"{cost:.3f}" for cost in allowed[rule]), interval(differences), verdict]


def no_harm(results: Sequence[Result], losses: Losses, column: str, rule: str) -> list[str]:
    """The row of a "no harm" goal; empty where nothing was run."""
    differences, cost = paired(losses, rule, column), compute_of(results, rule, corpus_of(column))
    if not differences or cost is None:
        return []
    met = mean(differences) <= HARMLESS and cost[1] <= CHEAP
    shares = [f"{share:.3f}" for share in cost]
    return [f"no harm on {column}", rule, *shares, interval(differences), "met" if met else "missed"]
