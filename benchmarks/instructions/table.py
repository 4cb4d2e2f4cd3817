"""The page of the instruction experiment: goals, then rules by data, from the results of finished runs. Pure."""

import math
from collections.abc import Callable, Sequence, Sized
from typing import Any

from benchmarks.common.first_passage import first_passage
from benchmarks.common.intervals import half_width, interval
from benchmarks.common.tables import by_cell, by_rule, markdown, mean
from benchmarks.instructions.rules import CONDITIONS, GOALS, KINDS, ORACLE, RULES, SHUFFLED, STEPS, TEACHERS, corpus

Result = dict[str, Any]
"""A ``result.json``; ``scorer_steps``, which :func:`charge` adds, is the cost of its scorers in steps."""
NAMES = [*TEACHERS, ORACLE]
COLUMNS = [corpus(kind, condition) for kind in KINDS for condition in CONDITIONS]


def charge(results: Sequence[Result], scorers: dict[tuple[str, int], Result]) -> list[Result]:
    """The results with the cost of scorers that a rule reads, ``scorer_steps``.

    It is the larger of their share of a full run's floating point operations and their seconds over those of a step.

    Args:
        scorers: (column, seed) -> result of the scorers' command.
    """
    charged = []
    for result in results:
        steps = 0.0
        if RULES[result["rule"]].scorers:
            made = scorers[result["corpus"], result["seed"]]
            pace = result["train_seconds"] / result["steps"]
            steps = max(made["scorer_share"] * STEPS, made["scorer_seconds"] / pace)
        charged.append(result | {"scorer_steps": steps})
    return charged


def differences(
    results: Sequence[Result], rule: str, column: str, control: str, value: Callable[[Result], float]
) -> list[float]:
    """Rule minus control, for the seeds that both have, in the order of the seeds."""
    cells = by_cell(results, value)
    own, other = cells.get((rule, column), {}), cells.get((control, column), {})
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def loss(result: Result) -> float:
    return float(result["final_validation_loss"])


def accuracy(result: Result) -> float:
    """Percent."""
    return 100 * float(result["token_accuracy"])


def compute(result: Result) -> float:
    """The cost of a run in shares of uniform's steps: its own, its scoring, its scorers."""
    return float((result["step_equivalents"] + result["scorer_steps"]) / STEPS)


def verdict(values: Sequence[float]) -> str:
    """Met where the whole 95% interval is at or below 0, likely where the mean is, else missed."""
    width = half_width(values)
    if not math.isnan(width) and mean(values) + width <= 0:
        return "met"
    return "likely" if mean(values) <= 0 else "missed"


def make_goals(results: Sequence[Result], *, planned: int) -> str:
    """Markdown: each rule in the goal's share of the steps against uniform in all of them."""
    lines = [["data", "rule", "steps", "compute, charged", "loss - full uniform's", "seeds", "verdict"], ["---"] * 7]
    for column in COLUMNS:
        for name, rule in RULES.items():
            values = differences(results, name, column, "uniform", loss)
            if name == "uniform" or not values:
                continue
            own = [result for result in results if (result["rule"], result["corpus"]) == (name, column)]
            cost = f"{mean(compute(result) for result in own):.3f}"
            seeds = f"{len(values)} of {planned}"
            lines.append([column, name, f"{rule.share}", cost, interval(values), seeds, verdict(values)])
    return markdown(lines)


def make_equal_steps(results: Sequence[Result], value: Callable[[Result], float], *, planned: int) -> str:
    """Markdown: teachers by data, each against uniform in equally many steps."""

    def cell(name: str, column: str) -> str:
        share = suffix(column)
        values = differences(results, f"{name}_{share}", column, f"uniform_{share}", value)
        return interval(values) + count(values, planned) if values else ""

    return by_rule([name for name in NAMES if name != "uniform"], present(results), cell)


def make_losses(results: Sequence[Result], value: Callable[[Result], float], digits: int, *, planned: int) -> str:
    """Markdown: the mean of full uniform and of every rule."""
    cells = by_cell(results, value)

    def cell(name: str, column: str) -> str:
        key = name if name == "full uniform" else f"{name}_{suffix(column)}"
        own = cells.get(("uniform" if key == "full uniform" else key, column), {})
        return f"{mean(own.values()):.{digits}f}" + count(own, planned) if own else ""

    return by_rule(["full uniform", *NAMES], present(results), cell)


def make_shuffled(results: Sequence[Result]) -> str:
    """Markdown: the share of pairs with a wrong completion among those of the last third of the steps."""
    found = [result for result in results if result["shuffled_trained"] is not None]
    cells = by_cell(found, lambda result: result["shuffled_trained"])

    def cell(name: str, column: str) -> str:
        own = cells.get((f"{name}_{suffix(column)}", column), {})
        return f"{mean(own.values()):.1%}" if own else ""

    return by_rule(TEACHERS, present(found), cell)


def make_shares(results: Sequence[Result]) -> str:
    """Markdown: the share of the pairs that the last round selected."""
    cells = by_cell(results, lambda result: result["last"].get("teacher/ratio"))

    def cell(name: str, column: str) -> str:
        own = cells.get((f"{name}_{suffix(column)}", column), {}).values()
        return ", ".join(f"{share:.0%}" for share in own) if own and None not in own else ""

    return by_rule(TEACHERS, present(results), cell)


def make_times(results: Sequence[Result]) -> str:
    """Markdown: steps at which a rule first had the final loss of uniform with as many steps; "-" where one never had.

    Of such a run, whose learning rate has not yet fallen to zero there.
    """
    curves = by_cell(results, lambda result: {int(step): value for step, value in result["validation_loss"].items()})

    def cell(name: str, column: str) -> str:
        share = suffix(column)
        own, control = (curves.get((f"{rule}_{share}", column), {}) for rule in (name, "uniform"))
        steps = [first_passage(own[seed], list(control[seed].values())[-1]) for seed in own.keys() & control.keys()]
        if not steps:
            return ""
        return f"{mean(steps):.0f}" if all(map(math.isfinite, steps)) else "-"

    return by_rule([name for name in NAMES if name != "uniform"], present(results), cell)


def summary(results: Sequence[Result]) -> str:
    """In words: how many rules meet the goals, and what wrong completions and leaving them out cost."""
    verdicts: dict[str, list[str]] = {}
    lines = []
    for column in present(results):
        condition = column.rpartition(", ")[2]
        for name, rule in RULES.items():
            teaches = name.rpartition("_")[0] not in ("", "uniform", "random", ORACLE)
            values = differences(results, name, column, "uniform", loss)
            if values and teaches and rule.is_for(condition):
                verdicts.setdefault(column, []).append(f"{name.rpartition('_')[0]} {verdict(values)}")
        if column in verdicts:
            control = differences(results, f"uniform_{suffix(column)}", column, "uniform", loss)
            lines.append(
                f"- {column}, {GOALS[condition]} of the steps: {', '.join(verdicts[column])}"
                + (f"; uniform itself {interval(control)}." if control else ".")
            )
    for kind in KINDS:
        right, wrong = (by_cell(results, loss).get(("uniform", corpus(kind, each)), {}) for each in CONDITIONS)
        cost = [wrong[seed] - right[seed] for seed in sorted(right.keys() & wrong.keys())]
        column = corpus(kind, "shuffled")
        share = suffix(column)
        gain = differences(results, f"{ORACLE}_{share}", column, f"uniform_{share}", loss)
        if cost and gain:
            lines.append(
                f"- {kind}: wrong completions cost full uniform {interval(cost)} nats. Training on the right ones "
                "alone, what a perfect selection could do, changes the loss at equal steps by "
                f"{interval(gain)}; below 0 it would be a gain."
            )
    return "\n".join(lines)


def count(seeds: Sized, planned: int) -> str:
    """How many seeds a cell has, where they are not all."""
    return f" [{len(seeds)} of {planned} seeds]" if len(seeds) < planned else ""


def suffix(column: str) -> str:
    """The percentage in the names of a column's rules."""
    return f"{100 * GOALS[column.rpartition(', ')[2]]:.0f}"


def present(results: Sequence[Result]) -> list[str]:
    found = {result["corpus"] for result in results}
    return [column for column in COLUMNS if column in found]


def page(results: Sequence[Result], *, command: str, planned: int) -> str:
    """The page; ``planned`` is the number of seeds that were asked for."""
    per_seed = {column: sum(rule.is_for(column.rpartition(", ")[2]) for rule in RULES.values()) for column in COLUMNS}
    runs = {column: sum(result["corpus"] == column for result in results) for column in COLUMNS}
    finished = "; ".join(f"{column}: {number} of {per_seed[column] * planned}" for column, number in runs.items())
    machines = sorted({result["machine"] for result in results})
    commits = sorted({result["versions"]["commit"] for result in results})
    sections = {
        "Goals": (
            "A rule in 0.87 of uniform's steps (clean pairs; the paper saves 13% of the time) or in 0.75 (shuffled "
            "completions; the goal is 25%) ends at most where uniform ends with all of its steps. Met: the whole "
            "paired 95% interval over the seeds is at or below 0; likely: the mean is. One seed has no interval and "
            "shows little. `compute` has scoring and scorers in it.",
            make_goals(results, planned=planned),
        ),
        "Loss at equal steps": (
            "Validation loss of a rule minus that of uniform in as many steps, nats per token of the completions.",
            make_equal_steps(results, loss, planned=planned),
        ),
        "Token accuracy at equal steps": (
            "The same for the percentage of the completions' tokens that are predicted (teacher forcing).",
            make_equal_steps(results, accuracy, planned=planned),
        ),
        "Losses": (
            "Means over the seeds. What wrong completions cost is the difference of full uniform between shuffled and "
            "clean. What leaving all of them out gains or costs is the difference between the oracle and uniform.",
            make_losses(results, loss, 3, planned=planned),
        ),
        "Token accuracies": ("Per cent, means over the seeds.", make_losses(results, accuracy, 1, planned=planned)),
        "Share selected": ("The share of the pairs that the last round trains on, by seed.", make_shares(results)),
        "Wrong completions trained": (
            f"Their share among the pairs of the last third of the steps; {SHUFFLED:.0%} of the data.",
            make_shuffled(results),
        ),
        "Time to uniform's loss": (
            "Steps at which a rule first had the final loss of uniform with as many steps.",
            make_times(results),
        ),
    }
    parts = [
        "# Fine-tuning on instruction pairs",
        f"    {command}",
        "A model of 0.9 M parameters, pretrained on plain text, is fine-tuned on 800 pairs for three epochs, with the "
        "loss on completions only. [What the pairs are and how runs are "
        "compared](../../benchmarks/README.md#instructions-does-teaching-save-steps-in-fine-tuning).",
        f"Finished runs: {finished}.",
        summary(results),
    ]
    for title, (text, table) in sections.items():
        if table:
            parts += [f"## {title}", text, table]
    rules = "\n".join(f"- {name}: {about}" for name, (about, _) in TEACHERS.items())
    rules += f"\n- {ORACLE}: uniform on the pairs with their own completions alone, where some are wrong"
    made = "\n".join([f"- {len(results)} runs", *(f"- machine: {name}" for name in machines)])
    return "\n\n".join([*parts, "## Rules", rules, f"{made}\n- commits: {', '.join(commits)}"]) + "\n"
