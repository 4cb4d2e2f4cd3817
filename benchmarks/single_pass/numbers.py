"""The numbers of the single-pass experiment: pairs of runs, charges, when a run reached uniform's final loss.

Pure: results in, numbers out. A result is a ``result.json`` with the keys that results.py adds.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.common.first_passage import first_passage
from benchmarks.common.tables import by_cell, mean
from benchmarks.single_pass.corpora import CORPORA
from benchmarks.single_pass.rules import RULES, STEPS

Result = dict[str, Any]
Losses = dict[tuple[str, str], dict[int, float]]
"""(rule, column) -> seed -> final loss."""


# -- pairs of runs ----------------------------------------------------------------------------------------------------


def all_losses(results: Sequence[Result]) -> Losses:
    """The final losses; a corpus with several target kinds of text has a column for each, too."""
    losses = by_cell(results)
    for kind in sorted({kind for result in results for kind in result["kinds"]}):
        own = by_cell([r for r in results if kind in r["kinds"]], lambda result, kind=kind: result["kinds"][kind])
        losses |= {(rule, f"{corpus}: {kind}"): values for (rule, corpus), values in own.items()}
    return losses


def columns_of(losses: Losses) -> list[str]:
    """The columns in the order of the corpora, each corpus before its kinds."""
    return sorted({column for _, column in losses}, key=lambda name: (list(CORPORA).index(corpus_of(name)), name))


def corpus_of(column: str) -> str:
    return column.split(":")[0]


def paired(losses: Losses, rule: str, column: str) -> list[float]:
    """Differences to uniform's final loss, for the seeds that both have."""
    own, control = losses.get((rule, column), {}), losses.get(("uniform", column), {})
    return [own[seed] - control[seed] for seed in sorted(own.keys() & control.keys())]


# -- costs ------------------------------------------------------------------------------------------------------------


def train_seconds(result: Result) -> float:
    """Seconds of training; without validation where the ledger was logged."""
    return result["last"].get("ledger/train_seconds", result["wall_seconds"])


def part_of_scorers(rule: str) -> float:
    """The share of both scorers' cost that a rule pays: a half where it reads the amateur alone."""
    return len(RULES[rule].scorers) / 2


def charge(results: Sequence[Result]) -> list[Result]:
    """The results, each with ``scorer_steps``: the cost of its scorers in steps of the learner.

    It is the larger of two numbers: their share of a full run's floating point operations, and their measured seconds
    over those of a step of uniform on that corpus (the median over its runs, or over the rule's own without uniform).
    """
    paces = by_cell(results, lambda result: train_seconds(result) / result["steps"])
    charged = []
    for result in results:
        steps = 0.0
        if part := part_of_scorers(result["rule"]):
            own = paces[result["rule"], result["corpus"]]
            pace = statistics.median(paces.get(("uniform", result["corpus"]), own).values())
            steps = part * max(result["scorer_share"] * STEPS, result["scorer_seconds"] / pace)
        charged.append(result | {"scorer_steps": steps})
    return charged


def compute_of(results: Sequence[Result], rule: str, corpus: str, *, runs: int = 1) -> tuple[float, float] | None:
    """The mean cost of a rule's runs on a corpus, in shares of a full run's steps: (total, scorers).

    The scorers are shared by ``runs`` runs. None where nothing was run.
    """
    own = [r for r in results if r["rule"] == rule and r["corpus"] == corpus]
    if not own:
        return None
    scorers = mean(r["scorer_steps"] for r in own) / runs / STEPS
    return mean(r["steps"] for r in own) / STEPS + scorers, scorers


# -- where uniform ended ----------------------------------------------------------------------------------------------


def curve(result: Result) -> dict[int, float]:
    """Step -> validation loss, ascending."""
    return dict(sorted((int(step), loss) for step, loss in result["validation_loss"].items()))


def reached(result: Result, target: float) -> float:
    """The step at which a run first reached a loss, linear between validations; inf if it never did."""
    return first_passage(curve(result), target)


def time_to_uniform(results: Iterable[Result], controls: dict[int, float]) -> tuple[float, float, float] | None:
    """Median (step, tokens, seconds) over the seeds at which runs reached the final loss of uniform with their seed.

    A seed that never did counts as infinite. Seconds are those of training, at the run's mean pace. None without a seed
    that both have.
    """
    at = [(r, reached(r, controls[r["seed"]])) for r in results if r["seed"] in controls]
    if not at:
        return None
    step, tokens, seconds = (
        statistics.median(per_step(r) * step for r, step in at)
        for per_step in (lambda r: 1.0, lambda r: r["tokens"] / r["steps"], lambda r: train_seconds(r) / r["steps"])
    )
    return step, tokens, seconds


# -- the forecast -----------------------------------------------------------------------------------------------------


def forecasts(results: Sequence[Result]) -> list[tuple[str, float, float]]:
    """(corpus, share that ``difference`` left out in its first decision, its gain over uniform) per seed.

    A run is a single pass, so its last decision is its first.
    """
    controls = by_cell(results)
    return [
        (r["corpus"], 1 - r["last"]["teacher/ratio"], controls["uniform", r["corpus"]][r["seed"]] - own)
        for r, own in ((r, r["final_validation_loss"]) for r in results if r["rule"] == "difference")
        if r["seed"] in controls.get(("uniform", r["corpus"]), {})
    ]


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation; nan for fewer than three pairs, or where one side is constant."""
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    if len(pairs) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
        return math.nan
    return statistics.correlation(left, right)
