"""The page of the benchmark, from the results of finished runs. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.tables import markdown
from benchmarks.seeds.arms import ADVERSARIAL, ARMS, COLOURING, PROBLEMS, RECALL

WORST = "on the worst 5% of inputs"
Result = dict[str, Any]

FIXED = tuple(name for name, arm in ARMS.items() if arm.fixed_seed)
OTHERS = tuple(name for name in ARMS if name != ADVERSARIAL)
COLUMNS = {
    "right": "right",
    "right, worst 5%": "input_match_p95",
    "right, worst": "input_match_worst",
    "never right": "never_right",
    "vote": "exact_match_vote",
    "loss": "loss",
    "loss, 95th percentile": "input_loss_p95",
    "loss, worst": "input_loss_worst",
}
LOSSES = ("loss", "input_loss_p95", "input_loss_worst")
DECISIVE = {"recall": ("exact_match_vote", "input_match_p95"), "graph_colouring": ("input_match_p95",)}
"""What the verdict compares. Right colourings of a cycle differ, so a colouring is checked and not voted on."""
FEW = 0.01
"""Shares of inputs below this are as good as none: fewer than 5 of 500 inputs that no seed answers."""


def of(results: Sequence[Result], task: str, arm: str) -> dict[int, dict[str, float]]:
    """Repetition -> the metrics of an arm."""
    return {one["repetition"]: one["metrics"] for one in results if (one["task"], one["arm"]) == (task, arm)}


def cell(values: Sequence[float], *, is_loss: bool) -> str:
    """The mean, and the range of several."""
    show = (lambda x: f"{x:.3f}") if is_loss else (lambda x: f"{x:.1%}")
    mean = show(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({show(min(values))} to {show(max(values))})"


def table(results: Sequence[Result], task: str) -> str:
    lines = [["training", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for arm in ARMS:
        if own := list(of(results, task, arm).values()):
            cells = [cell([one[key] for one in own], is_loss=key in LOSSES) for key in COLUMNS.values()]
            lines.append([arm, *cells])
    return markdown(lines)


def is_randomised(task: str, arms: dict[str, dict[str, float]]) -> bool:
    """Whether one repetition shows what the paper claims of the seed with the adversarial objective.

    Nearly no input is always wrong, and the decisive numbers are better than those of every other arm.
    """
    own, others = arms[ADVERSARIAL], [arms[name] for name in OTHERS]
    return own["never_right"] < FEW and all(own[key] > other[key] for other in others for key in DECISIVE[task])


def verdict(results: Sequence[Result], task: str) -> str:
    """One sentence: reproduced, not reproduced, not reachable at this size, or open where repetitions differ."""
    found = {arm: of(results, task, arm) for arm in ARMS}
    complete = sorted(set.intersection(*(set(own) for own in found.values())))
    if not complete:
        return "open: no repetition has all four arms"
    repetitions = [{arm: found[arm][number] for arm in ARMS} for number in complete]
    if all(arms[name]["never_right"] < FEW for arms in repetitions for name in FIXED):
        return "not reachable at this size: without a random seed nearly every input is answered, too"
    shown = sum(is_randomised(task, arms) for arms in repetitions)
    best = "best " + " and ".join({"exact_match_vote": "in the vote"}.get(key, WORST) for key in DECISIVE[task])
    count = f"in {shown} of {len(repetitions)} repetitions"
    if 0 < shown < len(repetitions):
        return f"open: {count} the seed with the q-norm is {best}"
    if shown:
        return f"reproduced: {count} the seed with the q-norm answers nearly every input for some seed, and is {best}"
    return f"not reproduced at this size: {count} the seed with the q-norm is {best}"


def page(results: Sequence[Result]) -> str:
    repetitions = ", ".join(str(number) for number in sorted({one["repetition"] for one in results}))
    seconds, machines = [one["seconds"] for one in results], ", ".join(sorted({one["machine"] for one in results}))
    first = results[0]
    parts: list[str] = []
    for name, problem in PROBLEMS.items():
        own = [one for one in results if one["task"] == name]
        if own:
            steps = f"{own[0]['steps']:,} steps of {problem.inputs} inputs x {problem.seeds} seeds"
            parts += [f"## {name}", "", f"{steps}. **{verdict(results, name)}.**", "", table(results, name), ""]
    return "\n".join(
        [
            "# Random seeds and the worst inputs",
            "",
            "    python -m benchmarks.seeds --output outputs/seeds --publish docs/results/seeds",
            "",
            "The claim of [arXiv 2408.10818](https://arxiv.org/abs/2408.10818): trained by a q-norm over inputs, with",
            "a random seed in the input, transformers become randomised algorithms: no input is always wrong, and a",
            "vote over seeds answers nearly all. With a fixed seed, or with the mean loss (q = 1), some inputs are",
            "always wrong. Its sizes, q and number of seeds are not in its public text. Those here were chosen for one",
            "core, so this is no replication of its experiments: models of one layer and 32 units",
            "([model.py](../../benchmarks/seeds/model.py)), Adam, the same rate and steps for all arms.",
            f"`recall`: {RECALL}. `graph_colouring`: {COLOURING}.",
            "",
            f"Repetitions {repetitions}; {first['inputs']:,} new inputs with {first['votes']} seeds",
            "each: the mean (range) over repetitions. Right: share of rows. Worst 5%: the 5th percentile over inputs",
            "of the share of right seeds. Never right: share of inputs that no seed answers. Vote: share of inputs",
            "whose most common answer is right; the vote at the 95th percentile is right where that is 95% or more.",
            "Losses are of an input's mean over seeds. With a fixed seed all rows of an input are equal.",
            "",
            *parts,
            f"{len(results)} runs of {min(seconds):.0f} to {max(seconds):.0f} s of a core, on {machines}.",
            "",
        ]
    )
