"""The page of the distillation experiment, from the results of finished runs. Pure.

The time to the target is read off a run's curve (common/first_passage.py). A run that never reached it counts as
"longer than its steps", and medians are of such bounds, too.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.first_passage import first_passage
from benchmarks.common.intervals import half_width
from benchmarks.common.tables import markdown
from benchmarks.distillation.arms import ARMS, LABELS_LONG, ONE_SHOT, SWITCH, TWO_SHOT, WRONG_PHASE
from benchmarks.distillation.problems import PROBLEMS

Result = dict[str, Any]
STUDENTS = 5
"""Students that share a source, in the amortised column."""
GOAL = 0.5
"""Share of the one-shot student's steps in which the two-shot one is to reach the target."""


def curve(result: Result, what: str = "accuracy") -> dict[int, float]:
    """Step -> value; keys of JSON are text."""
    return {int(step): value for step, value in result[what].items()}


def steps_to_target(result: Result) -> float:
    """inf if it was never reached."""
    return first_passage(curve(result), result["target"], rises=True)


def of(results: Sequence[Result], problem: str, arm: str) -> dict[int, Result]:
    """Seed -> result."""
    return {result["seed"]: result for result in results if (result["problem"], result["arm"]) == (problem, arm)}


def flops(result: Result, steps: float, *, students: float = math.inf) -> float:
    """FLOPs of ``steps`` steps, the source's passes included, and of the source's training a share of ``students``."""
    per_step = result["step_flops"] + result["source_step_flops"]
    return steps * per_step + result["source_training_flops"] / students


def in_steps(own: dict[int, Result], students: float = math.inf) -> list[float]:
    """The FLOPs up to the target, or of the whole run, in steps of a student alone."""
    return [
        flops(result, min(steps_to_target(result), result["steps"]), students=students) / result["step_flops"]
        for result in own.values()
    ]


def bounded(values: Sequence[float], is_bound: Sequence[bool]) -> str:
    """The median, with "> " where it is a lower bound."""
    order = sorted(zip(values, is_bound, strict=True))
    middle = order[(len(order) - 1) // 2 : len(order) // 2 + 1]
    text = f"{statistics.mean(value for value, _ in middle):,.0f}"
    return f"> {text}" if any(bound for _, bound in middle) else text


def row(own: dict[int, Result], *, planned: int) -> list[str]:
    """The cells of an arm."""
    times = [steps_to_target(result) for result in own.values()]
    bounds = [math.isinf(time) for time in times]
    steps = [min(time, result["steps"]) for time, result in zip(times, own.values(), strict=True)]
    last = [100 * list(curve(result).values())[-1] for result in own.values()]
    width = f" ± {half_width(last):.1f}" if len(last) > 1 else ""
    costs = [bounded(in_steps(own, students), bounds) for students in (math.inf, STUDENTS, 1)]
    of_planned = f" (of {planned})" if len(own) < planned else ""
    return [
        f"{len(own) - sum(bounds)} of {len(own)}{of_planned}",
        bounded(steps, bounds),
        *costs,
        f"{statistics.mean(last):.1f}{width}",
    ]


def ratios(results: Sequence[Result], problem: str, arm: str) -> dict[int, float]:
    """Seed -> the arm's steps to the target over the one-shot student's, or over its whole run where that never got
    there: then the ratio is an upper bound. inf if the arm never got there."""
    own, control = of(results, problem, arm), of(results, problem, ONE_SHOT)
    return {
        seed: steps_to_target(own[seed]) / min(steps_to_target(control[seed]), control[seed]["steps"])
        for seed in sorted(own.keys() & control.keys())
    }


def verdict(results: Sequence[Result], problem: str) -> str:
    """Whether the goal is met, with the numbers of seeds."""
    two, wrong = ratios(results, problem, TWO_SHOT), ratios(results, problem, WRONG_PHASE)
    if not two or not wrong:
        return "not measured yet"
    places = [result["checkpoints"] for result in of(results, problem, TWO_SHOT).values()]
    if any(place["before"] == place["middle"] for place in places):
        return "**no test of it**: the source's loss falls fastest at its first checkpoint, and none is before the fall"
    reached = sum(ratio <= GOAL for ratio in two.values())
    control = sum(ratio <= GOAL for ratio in wrong.values())
    word = "met" if reached == len(two) and control == 0 else "missed" if reached <= control else "met in part"
    finite = [ratio for ratio in two.values() if math.isfinite(ratio)]
    span = f" ({min(finite):.2f} to {max(finite):.2f} of them)" if finite else ""
    return (
        f"**{word}**: two-shot within half of the one-shot student's steps in {reached} of {len(two)} seeds{span}, "
        f"{WRONG_PHASE} in {control} of {len(wrong)}"
    )


def against_labels(results: Sequence[Result], problem: str) -> str:
    """What the labels alone take for the target, in the same FLOPs."""
    labels, two = of(results, problem, LABELS_LONG), of(results, problem, TWO_SHOT)
    shared = sorted(labels.keys() & two.keys())
    if not shared:
        return ""
    parts = []
    for text, students in (("a source that is there", math.inf), ("one of five students", STUDENTS), ("alone", 1)):
        wins = sum(
            steps_to_target(two[seed]) < math.inf
            and flops(two[seed], steps_to_target(two[seed]), students=students)
            < flops(labels[seed], min(steps_to_target(labels[seed]), labels[seed]["steps"]))
            for seed in shared
        )
        parts.append(f"{text}: {wins} of {len(shared)}")
    return (
        "Seeds in which two-shot reaches the target with fewer FLOPs than the labels alone, by who pays for the "
        f"source's training: {'; '.join(parts)}. The source's passes are always charged."
    )


def accuracy_at_middle(result: Result) -> float:
    """The source's accuracy at the last evaluation up to the checkpoint inside the fall."""
    accuracies = curve(result, "source_accuracy")
    step = max((step for step in accuracies if step <= result["checkpoints"]["middle"]), default=min(accuracies))
    return accuracies[step]


def about_problem(name: str, results: Sequence[Result]) -> str:
    problem = PROBLEMS[name]
    runs = [result for result in results if result["problem"] == name]
    named = of(results, name, TWO_SHOT)
    places = "; ".join(
        f"{seed}: {result['checkpoints']['middle']:,} ({accuracy_at_middle(result):.0%})"
        for seed, result in sorted(named.items())
    )
    source = statistics.mean(list(curve(result, "source_accuracy").values())[-1] for result in named.values())
    ratio = statistics.mean(result["source_step_flops"] * 3 / result["step_flops"] for result in named.values())
    return (
        f"A source has {ratio:.0f} times the FLOPs of a student, {problem.source_steps:,} steps and a checkpoint every "
        f"{problem.save_every}; its last accuracy is {source:.1%}. A student has {problem.steps:,} steps of "
        f"{problem.batch} rows. Target: {problem.target:.0%} of the source's last accuracy. The checkpoint inside the "
        f"fall, by seed, and the source's accuracy there: {places}. {len(runs)} runs."
    )


def section(name: str, results: Sequence[Result], *, planned: int) -> list[str]:
    header = [
        "arm",
        "seeds that reach the target",
        "steps to it",
        "FLOPs to it, in steps",
        f"and 1/{STUDENTS} of the source's training",
        "and all of it",
        "last accuracy, %",
    ]
    lines = [header, ["---"] * len(header)]
    lines += [[arm, *row(own, planned=planned)] for arm in ARMS if (own := of(results, name, arm))]
    return [
        about_problem(name, results),
        f"Goal: {verdict(results, name)}.",
        markdown(lines),
        against_labels(results, name),
    ]


def page(results: Sequence[Result], *, command: str, planned: int) -> str:
    """The page; ``planned`` is the number of seeds that were asked for."""
    parts = [
        "# Distillation from intermediate checkpoints",
        f"    {command}",
        "Do students learn sooner from a checkpoint inside the steepest fall of their source's loss than from its last "
        "one ([arXiv 2410.05464](https://arxiv.org/abs/2410.05464))? The student's loss is the divergence from the "
        f"source alone; the source changes to its last checkpoint after {SWITCH:.0%} of the steps. "
        "[How it is measured](../../benchmarks/README.md#distillation-does-a-student-learn-sooner-from-intermediate-"
        "checkpoints).",
        f"Goal: two-shot reaches the target in at most half of the one-shot student's steps, and {WRONG_PHASE} does "
        "not. A one-shot student that never reaches it counts with all of its steps.",
    ]
    if not results:
        return "\n\n".join([*parts, "No run has finished."]) + "\n"
    titles = {
        "parity": "Sparse parity",
        "parity_100": "Sparse parity, with a checkpoint every 100 steps",
        "pcfg": "PCFG",
    }
    for name in PROBLEMS:
        if of(results, name, TWO_SHOT):
            parts += [f"## {titles[name]}", *filter(None, section(name, results, planned=planned))]
    parts += [
        "![Accuracy against steps and FLOPs](distillation.png)",
        "Medians over the seeds; `>`: so many steps were not enough. FLOPs are those of matrices, in steps of a "
        "student without a source; `and 1/5 of the source's training`: five students share it. Last accuracy: mean "
        "with its 95% interval.",
        "## Arms",
        "\n".join(f"- {name}: {arm.about}" for name, arm in ARMS.items()),
        "\n".join(
            [
                *(f"- machine: {name}" for name in sorted({result["machine"] for result in results})),
                f"- commits: {', '.join(sorted({result['versions']['commit'] for result in results}))}",
                f"- CPU seconds of all runs: {sum(result['seconds'] for result in results):,.0f}",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"
