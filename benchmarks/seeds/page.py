"""The page of the benchmark, from the results of finished runs. Pure."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.tables import markdown
from benchmarks.seeds.arms import ADVERSARIAL, ARMS, COLOURING, PROBLEMS, RECALL

Result = dict[str, Any]

Arms = dict[str, dict[str, float]]
"""Arm -> its metrics, of one repetition."""

RANDOM = "random seed, q = 1"
FIXED = tuple(name for name, arm in ARMS.items() if arm.fixed_seed)
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
FEW = 0.01
"""Shares of inputs below this are as good as none: fewer than 5 of 500 inputs."""


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


def _always_wrong_with_a_fixed_seed(arms: Arms) -> bool:
    return all(arms[name]["never_right"] >= FEW for name in FIXED)


def _seldom_always_wrong(arms: Arms) -> bool:
    return arms[ADVERSARIAL]["never_right"] < FEW


def _worst_inputs_are_better(arms: Arms) -> bool:
    return arms[ADVERSARIAL]["input_match_p95"] > arms[RANDOM]["input_match_p95"]


def _vote_is_better(arms: Arms) -> bool:
    return arms[ADVERSARIAL]["exact_match_vote"] > arms[ADVERSARIAL]["right"]


CLAIMS: dict[str, Callable[[Arms], bool]] = {
    "with a fixed seed, 1% of the inputs or more are always wrong": _always_wrong_with_a_fixed_seed,
    "with a random seed and the q-norm, fewer than 1% are always wrong": _seldom_always_wrong,
    "the worst 5% of inputs are right for more seeds than with q = 1": _worst_inputs_are_better,
    "its vote is right more often than a single seed": _vote_is_better,
}
"""What the paper claims, as it is counted: claim -> whether one repetition shows it."""


def repetitions_of(results: Sequence[Result], task: str) -> list[Arms]:
    """The repetitions that have all arms."""
    found = {arm: of(results, task, arm) for arm in ARMS}
    complete = sorted(set.intersection(*(set(own) for own in found.values())))
    return [{arm: found[arm][number] for arm in ARMS} for number in complete]


def claim_verdict(holds: Callable[[Arms], bool], repetitions: Sequence[Arms]) -> str:
    """Reproduced where it holds in every repetition."""
    if not repetitions:
        return "no repetition has all arms"
    shown = sum(map(holds, repetitions))
    return f"{'' if shown == len(repetitions) else 'not '}reproduced: {shown} of {len(repetitions)}"


def verdict(results: Sequence[Result], task: str) -> str:
    """Of all claims together: reproduced, not reproduced, or not reachable at this size."""
    repetitions = repetitions_of(results, task)
    if not repetitions:
        return "open: no repetition has all four arms"
    if not any(_always_wrong_with_a_fixed_seed(arms) for arms in repetitions):
        return "not reachable at this size: without a random seed nearly every input is answered, too"
    held = [all(holds(arms) for arms in repetitions) for holds in CLAIMS.values()]
    if all(held):
        return "reproduced: every claim holds in every repetition"
    return f"not reproduced at this size: {sum(held)} of {len(CLAIMS)} claims hold in every repetition"


def claims(results: Sequence[Result]) -> str:
    tasks = [name for name in PROBLEMS if any(one["task"] == name for one in results)]
    lines = [["claim, in how many repetitions", *tasks], ["---"] * (1 + len(tasks))]
    for claim, holds in CLAIMS.items():
        lines.append([claim, *(claim_verdict(holds, repetitions_of(results, name)) for name in tasks)])
    return markdown(lines)


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
            "",
            f"- `recall`: {RECALL}",
            *(f"{'  ' if i else '- `graph_colouring`: '}{line}" for i, line in enumerate(COLOURING)),
            "",
            f"Repetitions {repetitions}, each with its own first weights; {first['inputs']:,} new inputs with",
            f"{first['votes']} seeds each. Mean (range) over repetitions. Right: share of rows. Worst 5%: the 5th",
            "percentile over inputs of the share of right seeds. Never right: share of inputs that no seed answers.",
            "Vote: share of inputs whose most common answer is right; the vote at the 95th percentile is right where",
            "that is 95% or more. Losses are of an input's mean over seeds. With a fixed seed all rows of an input are",
            "equal. Sizes come from about twenty trial runs, and how the claims are counted was decided after them.",
            "",
            claims(results),
            "",
            *parts,
            f"{len(results)} runs of {min(seconds):.0f} to {max(seconds):.0f} s of a core, on {machines}.",
            "",
        ]
    )
