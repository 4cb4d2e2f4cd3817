"""The page of the editing experiment, from the results of finished parts. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common.intervals import half_width, interval
from benchmarks.common.tables import markdown, mean
from benchmarks.editing.languages import RELATED
from benchmarks.editing.runs import LAST, MEAN_EVERY, MEAN_STEPS

Result = Mapping[str, Any]
BUDGET = 0.02
"""Unlearning: most that the control's loss may rise, as a share of it."""
ADDS, NEGATES = ("aligned", "irrelevant"), ("irrelevant", "contradictory")
"""Relations for which Li et al. expect that addition has both languages, and that negation keeps the first."""
NEGATED = 0.5
"""Coefficient of the negated vector in the verdict."""

Losses = Mapping[str, Sequence[float]]
"""Edit -> accuracy on the first language, its loss, accuracy on the second, its loss."""


def added(edits: Losses, vector: str = "other") -> float:
    """The smaller of both accuracies, with the coefficient where it is largest."""
    ways = [edit for edit in edits if edit.startswith("first + ") and edit.endswith(vector)]
    return max(min(edits[edit][0], edits[edit][2]) for edit in ways)


def kept(edits: Losses, vector: str = "other") -> float:
    """The accuracy on the first language without half of the second's vector."""
    return edits[f"first - {NEGATED:g} {vector}"][0]


def forgotten(edits: Losses) -> float:
    """The rise of the second language's loss by that, in nats."""
    return edits[f"first - {NEGATED:g} other"][3] - edits["first"][3]


def in_order(results: Sequence[Result], value: Callable[[Losses], float], expected: Sequence[str]) -> int:
    """In how many seeds the value of all expected relations is above that of the other one."""
    seeds = [{relation: value(result["edits"][relation]) for relation in RELATED} for result in results]
    return sum(
        min(seed[relation] for relation in expected) > max(seed[other] for other in RELATED if other not in expected)
        for seed in seeds
    )


def verdict(count: int, seeds: int) -> str:
    return {seeds: "reproduced", 0: "not reproduced"}.get(count, "depends on the seed")


def languages_page(results: Sequence[Result]) -> list[str]:
    lines = [["second language", "edit", "accuracy, first", "accuracy, second", "loss, second"], ["---"] * 5]
    short = [["second language", "addition: smaller accuracy", "with a random vector"], ["---"] * 5]
    short[0] += ["negation: accuracy, first", "rise of the second's loss"]
    for relation in RELATED:
        every = [result["edits"][relation] for result in results]
        short.append(
            [
                relation,
                f"{mean(map(added, every)):.1%}",
                f"{mean(added(one, 'random') for one in every):.1%}",
                f"{mean(map(kept, every)):.1%}",
                f"{mean(map(forgotten, every)):.2f}",
            ]
        )
        for edit in every[0]:
            values = [[one[edit][i] for one in every] for i in (0, 2, 3)]
            cells = [f"{mean(values[0]):.1%}", f"{mean(values[1]):.1%}", f"{mean(values[2]):.3f}"]
            lines.append([relation, edit, *cells])
    adds, negates = in_order(results, added, ADDS), in_order(results, kept, NEGATES)
    seeds = len(results)
    return [
        "## Two languages",
        "",
        "A base knows a meaning for each of 64 words. A tuning on a language changes that of 32 of them: in the",
        "aligned one 24 as the first does, in the irrelevant one the other 32, in the contradictory one the same 32,",
        "to others. The first's vector has the coefficient 1. Addition: with the second's coefficient, of four, at",
        f"which the smaller of both accuracies is largest. Negation: {NEGATED:g} of the second's vector.",
        "Theory: [Li et al.](https://arxiv.org/abs/2504.10957)",
        "",
        markdown(short),
        "",
        "- Addition works better for aligned and irrelevant languages than for a contradictory one in",
        f"  {adds} of {seeds} seeds: {verdict(adds, seeds)}.",
        "- Negation keeps more of the first for irrelevant and contradictory languages than for an aligned one in",
        f"  {negates} of {seeds} seeds: {verdict(negates, seeds)}.",
        "",
        f"Means over {seeds} seeds:",
        "",
        markdown(lines),
        "",
    ]


def chosen(result: Result, arm: str) -> tuple[str, Mapping[str, float]]:
    """The amount of an arm that raises the target's control loss most within the budget; "0" and the base for none."""
    base = result["base"]
    rows = {"0": base} | result["arms"][arm]
    allowed = {
        amount: losses
        for amount, losses in rows.items()
        if losses["rest/control"] <= (1 + BUDGET) * base["rest/control"]
    }
    amount = max(allowed, key=lambda amount: allowed[amount]["target/control"])
    return amount, allowed[amount]


def unlearning_page(results: Sequence[Result]) -> list[str]:
    names = ("target", "aligned", "irrelevant", "rest")
    lines = [["arm", "amounts", *(f"{name}, change of the loss" for name in names)], ["---"] * 6]
    for arm, unit in (("vector", "coefficient"), ("random", "coefficient"), ("ascent", "steps")):
        found = [chosen(result, arm) for result in results]
        cells = []
        for name in names:
            key = f"{name}/validation"
            shares = [
                100 * (losses[key] / result["base"][key] - 1)
                for (_, losses), result in zip(found, results, strict=True)
            ]
            width = f" ± {half_width(shares):.1f}" if len(shares) > 1 else ""
            cells.append(f"{mean(shares):+.1f}{width}%")
        lines.append([arm, f"{', '.join(amount for amount, _ in found)} ({unit})", *cells])
    return [
        "## Unlearning one package",
        "",
        "A small model of the standard library forgets tkinter, by the negative of a tuning on it, by a random vector",
        "of equal norm per tensor, or by gradient ascent. The amount is the one that raises the target's loss most",
        f"while that of the other packages rises by at most {BUDGET:.0%}, on text that is not in the tables. Aligned:",
        "idlelib, which is written with tkinter. Irrelevant: email.",
        "",
        markdown(lines),
        "",
        f"{len(results)} seeds.",
        "",
    ]


def means_page(results: Sequence[Result]) -> list[str]:
    lines = [["last checkpoints", "steps of the decay", "mean - decayed", "mean - constant", "decayed - constant"]]
    lines.append(["---"] * 5)

    def differences(own: str, other: str) -> str:
        return interval([result["losses"][own] - result["losses"][other] for result in results])

    for last in LAST:
        pairs = ((f"mean_{last}", f"decayed_{last}"), (f"mean_{last}", "constant"), (f"decayed_{last}", "constant"))
        lines.append([str(last), str(last * MEAN_EVERY), *(differences(*pair) for pair in pairs)])
    return [
        "## A mean in place of a decay",
        "",
        f"{MEAN_STEPS} steps at a constant rate, a checkpoint every {MEAN_EVERY} steps, and the mean of the last ones",
        "(`titan_attent.edit mean`), against a run of as many steps whose rate falls to zero over the last ones.",
        "Nats of validation loss; below 0 the first is better.",
        "",
        markdown(lines),
        "",
        f"{len(results)} seeds. All means come from one run; each decay is a run of its own.",
        "",
    ]


PAGES: dict[str, Callable[[Sequence[Result]], list[str]]] = {
    "languages": languages_page,
    "unlearning": unlearning_page,
    "means": means_page,
}


def page(results: Sequence[Result], *, command: str) -> str:
    """The page; parts without a result are left out."""
    parts: list[str] = []
    for part, make in PAGES.items():
        own = sorted((result for result in results if result["part"] == part), key=lambda result: result["seed"])
        parts += make(own) if own else []
    machines = sorted({result["machine"] for result in results})
    commits = sorted({result["versions"]["commit"] for result in results})
    return "\n".join(
        [
            "# Editing checkpoints: languages, unlearning, means",
            "",
            f"    {command}",
            "",
            *parts,
            f"- machine: {', '.join(machines)}; commit {', '.join(commits)}",
        ]
    )
