"""The tables of benchmarks.hyla: the scores of each split over seeds, the authors' figures, and the verdicts."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.common.intervals import half_width
from benchmarks.common.tables import markdown
from benchmarks.hyla.models import METHODS
from benchmarks.hyla.problems import PROBLEMS

PUBLISHED: dict[str, dict[str, str]] = {"fuzzy_logic": {"hyla": "81.1 ± 7.8", "softmax": "63.3", "linear": "59.9"}}
"""The authors' figures for the last split, in percent, over 3 seeds."""
OTHERS = ("softmax", "linear")
LEARNED = 0.5
"""The score of trained combinations below which a task was not learned, so that nothing follows for others."""
THEIRS = {
    "fuzzy_logic": "50,000 steps of 128 rows, the best of four rates and decays",
    "sraven": "78,125 to 312,500 steps of 128 rows, the best of eight settings",
}

Scores = dict[str, dict[int, dict[str, float]]]
"""method -> seed -> split -> score."""


def scores_of(results: Sequence[dict[str, Any]], task: str) -> Scores:
    found: Scores = {}
    for result in results:
        run = result["run"]
        if run["task"] == task and not run.get("pilot"):
            found.setdefault(run["method"], {})[run["seed"]] = result["scores"]
    return found


def percent(values: Sequence[float]) -> str:
    """The mean and half of its 95% interval, in percent."""
    text = f"{100 * fmean(values):.1f}"
    return f"{text} ± {100 * half_width(values):.1f}" if len(values) > 1 else text


def verdict(scores: Scores, task: str) -> str:
    """Whether HYLA is above softmax and linear attention on the combinations that were not trained.

    It is if on each untrained split the 95% interval of its difference to both, seed by seed, is above 0. It is not if
    one of these intervals is below 0, or if the seeds do not tell.
    """
    if not {"hyla", *OTHERS} <= scores.keys():
        return "not measured: it needs hyla, softmax and linear"
    trained, *untrained = PROBLEMS[task].splits
    best = max(fmean(of_seed[trained] for of_seed in scores[name].values()) for name in ("hyla", *OTHERS))
    if best < LEARNED:
        return (
            f"not reachable at this size: the best score of trained combinations is {100 * best:.1f}, below "
            f"{100 * LEARNED:.0f}"
        )
    parts, holds, fails = [], True, False
    for split in untrained:
        for other in OTHERS:
            seeds = sorted(scores["hyla"].keys() & scores[other].keys())
            if len(seeds) < 2:
                return "not measured: it needs two seeds"
            differences = [scores["hyla"][seed][split] - scores[other][seed][split] for seed in seeds]
            holds &= fmean(differences) - half_width(differences) > 0
            fails |= fmean(differences) + half_width(differences) < 0
            parts.append(f"{split}, HYLA minus {other}: {percent(differences)}")
    undecided = "not reproduced at this size: its intervals do not all leave out 0"
    word = "reproduced" if holds else "not reproduced" if fails else undecided
    return f"{word} ({'; '.join(parts)}; {len(seeds)} seeds)"


def rates_of(results: Sequence[dict[str, Any]], task: str, method: str) -> list[float]:
    """The peak learning rates of the runs that are not pilots."""
    runs = [result["run"] for result in results if not result["run"].get("pilot")]
    return sorted({run["lr"] for run in runs if (run["task"], run["method"]) == (task, method)})


def pilots(results: Sequence[dict[str, Any]], task: str) -> list[str]:
    """A sentence on the runs that chose the rates, if there are any."""
    found = [result for result in results if result["run"]["task"] == task and result["run"].get("pilot")]
    if not found:
        return []
    trained = PROBLEMS[task].splits[0]
    steps = " or ".join(f"{steps:,}" for steps in sorted({result["run"]["steps"] for result in found}))
    cells = ", ".join(
        f"{run['method']} {run['lr']}: {100 * result['scores'][trained]:.1f}"
        for result in found
        for run in [result["run"]]
    )
    return [f"Each attention has the rate with the best trained score in a pilot of {steps} steps ({cells})."]


def page(results: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the page."""
    lines = ["# Attention as a hypernetwork on untrained combinations", ""]
    for task, problem in PROBLEMS.items():
        scores = scores_of(results, task)
        if not scores:
            continue
        runs = {
            (run["steps"], run["batch_size"], run["weight_decay"])
            for run in (result["run"] for result in results)
            if run["task"] == task and not run.get("pilot")
        }
        sizes = "; ".join(f"{steps:,} steps of {batch} rows, decay {decay}" for steps, batch, decay in sorted(runs))
        lines += [f"## {task}", "", f"**Verdict: {verdict(scores, task)}.**", ""]
        lines += [f"Here: {sizes}. The authors: {THEIRS[task]}. Model and task are theirs."]
        lines += [*pilots(results, task), ""]
        published = PUBLISHED.get(task, {})
        theirs = [f"authors, {problem.splits[-1]}"] if published else []
        head = ["attention", "rate", "seeds", *problem.splits, *theirs]
        rows = [
            [
                method,
                ", ".join(f"{lr}" for lr in rates_of(results, task, method)),
                str(len(scores[method])),
                *(percent([of_seed[split] for of_seed in scores[method].values()]) for split in problem.splits),
                *([published.get(method, "")] if published else []),
            ]
            for method in METHODS
            if method in scores
        ]
        what = "R², the mean over rows" if problem.score == "R2" else "rows all of whose features are right"
        lines += [markdown([head, ["---"] * len(head), *rows]), "", f"In percent: {what}; ± is a 95% interval.", ""]
    return lines
