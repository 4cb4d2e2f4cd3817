"""The page of the benchmark, from the results of finished runs. Pure."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.tables import markdown
from benchmarks.mot.arms import ARMS, DATA, STAGES

LEVELS = (0.3, 0.1, 0.03)
"""Losses whose first step is reported."""

Result = dict[str, Any]


def last_loss(result: Result) -> float:
    return result["looks"][-1]["loss"]


def reached_at(result: Result, level: float) -> int | None:
    """The first step from which on every look's loss is below ``level``; None if the last is not."""
    found = None
    for look in result["looks"]:
        found = (look["step"] if found is None else found) if look["loss"] < level else None
    return found


def mean_and_range(results: Sequence[Result], value: Callable[[Result], float]) -> str:
    values = [value(result) for result in results]
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def steps_to(results: Sequence[Result], level: float) -> str:
    """The steps of the seeds that reach it; "no" where none does."""
    steps = sorted(step for result in results if (step := reached_at(result, level)) is not None)
    if not steps:
        return "no"
    share = "" if len(steps) == len(results) else f" ({len(steps)} of {len(results)})"
    return ", ".join(map(str, steps)) + share


def compare(own: Sequence[Result], other: Sequence[Result]) -> str:
    """In which seeds the final loss of ``own`` is below that of ``other``: "below in 2 of 3 seeds"."""
    losses = {result["seed"]: last_loss(result) for result in other}
    pairs = [(last_loss(result), losses[result["seed"]]) for result in own if result["seed"] in losses]
    below = sum(mine < others for mine, others in pairs)
    return f"below in {below} of {len(pairs)} seeds"


def of(results: Sequence[Result], data: str, arm: str) -> list[Result]:
    return sorted((one for one in results if (one["data"], one["arm"]) == (data, arm)), key=lambda one: one["seed"])


def verdict(results: Sequence[Result], rival: str) -> str:
    """Whether three stages end below ``rival`` on clusters: "reproduced" needs three seeds, all below."""
    stages, others = of(results, "clusters", STAGES), of(results, "clusters", rival)
    losses = {result["seed"]: last_loss(result) for result in others}
    pairs = [(last_loss(result), losses[result["seed"]]) for result in stages if result["seed"] in losses]
    below = sum(mine < other for mine, other in pairs)
    if 0 < below < len(pairs):
        return f"open: three stages end below it in {below} of {len(pairs)} seeds"
    if len(pairs) < 3:
        sign = "below" if below else "not below"
        return f"open: three stages end {sign} it in {len(pairs)} of {len(pairs)} seeds, of which three are needed"
    return "reproduced: below it in every seed" if below else "not reproduced: below it in no seed"


def table(results: Sequence[Result], data: str) -> str:
    head = ["training", "final loss", *(f"steps to {level}" for level in LEVELS)]
    lines = [[*head, "largest share", "purity", "experts", "three stages are"]]
    lines.append(["---"] * len(lines[0]))
    stages = of(results, data, STAGES)
    for arm in ARMS:
        own = of(results, data, arm)
        if not own:
            continue
        routing = [
            mean_and_range(own, lambda one: one["looks"][-1]["largest_share"]),
            mean_and_range(own, lambda one: one["looks"][-1]["purity"]),
            ", ".join(str(one["looks"][-1]["separation"]) for one in own),
        ]
        if ARMS[arm].gate == "all":
            routing = ["-"] * 3
        steps = [steps_to(own, level) for level in LEVELS]
        against = "-" if arm == STAGES else compare(stages, own)
        lines.append([arm, mean_and_range(own, last_loss), *steps, *routing, against])
    return markdown(lines)


def page(results: Sequence[Result]) -> str:
    seeds = sorted({one["seed"] for one in results})
    seconds, first = [one["seconds"] for one in results], results[0]
    machines = ", ".join(sorted({one["machine"] for one in results}))
    parts: list[str] = []
    titles = {"clusters": "Clusters of classes, with distractors", "one signal": "Unmodified data: one signal for all"}
    for data in DATA:
        parts += [f"## {titles[data]}", "", table(results, data), ""]
    rivals = ("end to end", "no attention", "dense, equal active parameters", "dense, equal total parameters")
    verdicts = [["three stages against", "verdict"], ["---"] * 2]
    verdicts += [[rival, verdict(results, rival)] for rival in rivals]
    return "\n".join(
        [
            "# Mixture of transformers in three stages",
            "",
            "    python -m benchmarks.mot --output outputs/mot --publish docs/results/mot",
            "",
            "The claim of [arXiv 2510.27004](https://arxiv.org/abs/2510.27004): with experts that are transformer",
            "blocks, a trained gate and three stages of training, the loss falls faster than that of one transformer.",
            "Formulas, sizes and rates are not public; the data and the one-layer model are inferred from reviews",
            "([model.py](../../benchmarks/mot/model.py)), so this is no replication of their experiments.",
            "",
            f"Seeds {', '.join(map(str, seeds))}; {first['steps']} steps of Adam at {first['rate']} for every arm,",
            "not tuned per arm, a third of the steps per stage; the rate is halved ten times over the last third.",
            "Losses are mean squared errors of +-1 on 1,024 fresh sequences: mean (range) over seeds. Largest share:",
            "of the expert with the most sequences. Purity: share of sequences that go to the usual expert of their",
            "class.",
            "Experts: how many are the usual one of a class.",
            "",
            markdown(verdicts),
            "",
            "![loss against steps](mot.png)",
            "",
            *parts,
            f"{len(results)} runs of {min(seconds):.1f} to {max(seconds):.1f} s of a core, on {machines}.",
        ]
    )
