"""The page of the text experiment, from the results of finished runs. Pure.

Costs are in steps of a student alone: FLOPs of a step are taken to be proportional to parameters, and a forward pass
to be a third of a step.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.common.first_passage import first_passage
from benchmarks.common.intervals import interval
from benchmarks.common.tables import markdown, mean
from benchmarks.distillation_text.rules import (
    ARMS,
    DOMAINS,
    LABELS,
    PYTHON,
    SHARE,
    STUDENTS,
    Scale,
    checkpoints_of,
)

Result = dict[str, Any]


def students(results: Sequence[Result], arm: str) -> dict[int, Result]:
    """Seed -> result."""
    return {each["seed"]: each for each in results if each["role"] == "student" and each["arm"] == arm}


def final(result: Result, domain: str) -> float:
    return float(list(result["curves"][domain].values())[-1])


def differences(results: Sequence[Result], arm: str, domain: str) -> list[float]:
    """Final losses minus those of the labels in all steps, seed by seed."""
    own, control = students(results, arm), students(results, LABELS)
    return [final(own[seed], domain) - final(control[seed], domain) for seed in sorted(own.keys() & control.keys())]


def cost(results: Sequence[Result], arm: str, scale: Scale, *, sharing: int) -> float | None:
    """Steps of a student alone, the source's training and its passes included, shared by ``sharing`` students."""
    own = students(results, arm)
    if not own:
        return None
    spent = mean(result["steps"] for result in own.values())
    if not ARMS[arm].schedule:
        return spent
    shared = []
    for seed, result in own.items():
        sources = [each for each in results if each["role"] == "source" and each["seed"] == seed]
        passes = [
            each["step_equivalents"]
            for each in results
            if each["role"] == "targets"
            and (each["seed"], each["kind"]) == (seed, ARMS[arm].kind)
            and each["step"] in checkpoints_of(ARMS[arm].schedule, scale)
        ]
        if not sources:
            return None
        ratio = sources[0]["parameters"] / result["parameters"]
        shared.append(ratio * (sources[0]["steps"] + sum(passes)) / sharing)
    return spent + mean(shared)


def verdict(values: Sequence[float]) -> str:
    return "" if not values else "met" if max(values) <= 0 else "missed" if min(values) > 0 else "in part"


def time_to(results: Sequence[Result], arm: str) -> str:
    """Mean step at which a run first had the labels' final loss."""
    own, control = students(results, arm), students(results, LABELS)
    curves = {seed: {int(k): v for k, v in result["curves"][PYTHON].items()} for seed, result in own.items()}
    steps = [first_passage(curves[seed], final(control[seed], PYTHON)) for seed in own.keys() & control.keys()]
    return "" if not steps else f"{mean(steps):.0f}" if max(steps) < float("inf") else "-"


def page(results: Sequence[Result], *, command: str, scale: Scale, planned: int) -> str:
    header = [
        "arm",
        "seeds",
        "loss, Python",
        "minus labels'",
        "goal",
        "step of labels' loss",
        "loss, C++",
        "minus labels'",
    ]
    header += ["cost, one student", f"cost, one of {STUDENTS}"]
    lines = [header, ["---"] * len(header)]
    for arm in ARMS:
        own = students(results, arm)
        if not own:
            continue
        cells = [arm, f"{len(own)} of {planned}"]
        for domain in DOMAINS:
            values = differences(results, arm, domain)
            cells += [
                f"{mean(final(each, domain) for each in own.values()):.3f}",
                interval(values) if values and arm != LABELS else "",
            ]
            if domain == PYTHON:
                is_goal = ARMS[arm].share < 1
                cells += [verdict(values) if is_goal else "", time_to(results, arm) if arm != LABELS else ""]
        costs = [cost(results, arm, scale, sharing=sharing) for sharing in (1, STUDENTS)]
        lines.append([*cells, *("" if each is None else f"{each:,.0f}" for each in costs)])
    missing = [arm for arm in ARMS if len(students(results, arm)) < planned]
    machines = sorted({each["machine"] for each in results})
    commits = sorted({each["versions"]["commit"] for each in results})
    about = (
        f"Goal: in {SHARE} of the steps a distilled student ends at most at the loss that the labels alone reach in "
        f"all {scale.steps}, its source and the source's passes shared by {STUDENTS} students. One student with a "
        "source of its own may lose. [How it is measured](../../benchmarks/README.md#distillation-on-text)."
    )
    legend = (
        "Losses in nats per token, means over the seeds; differences seed by seed with their 95% interval. Goal: met "
        "where no seed ends above, in part where some do not. Step of the labels' loss: read off a run's own curve; "
        "-: never. Costs: steps of a student alone; C++ headers are the other domain."
    )
    parts = [
        "# Distillation on text",
        f"    {command}",
        about,
        f"Missing: {'; '.join(missing)}." if missing else "All runs have finished.",
        markdown(lines) if len(lines) > 2 else "No run has finished.",
        legend,
        "\n".join(f"- {name}: {arm.about}" for name, arm in ARMS.items()),
        "\n".join([*(f"- machine: {name}" for name in machines), f"- commits: {', '.join(commits)}"]),
    ]
    return "\n\n".join(parts) + "\n"
