"""The page of the twelve cells, from the results of finished runs. Pure."""

from collections.abc import Sequence
from typing import Any

from benchmarks.common.tables import markdown
from benchmarks.parity.model import METHODS, RATES

PUBLISHED = {
    "direct": dict.fromkeys(RATES, False),
    "chain of thought": {8: True, 16: False, 32: False},
    "teacher forcing": dict.fromkeys(RATES, True),
    "self-consistency": dict.fromkeys(RATES, True),
}
"""Which cells the paper reports as solved, after 350 epochs of 100,000 rows."""


def solved_at(result: dict[str, Any], epochs: float = float("inf")) -> float | None:
    """The first epoch from which on every look had all test rows right, at most ``epochs``; None if there was none."""
    found = None
    for look in result["looks"]:
        if look["epoch"] <= epochs:
            found = (look["epoch"] if found is None else found) if look["accuracy"] == 1.0 else None
    return found


def cell(results: Sequence[dict[str, Any]]) -> str:
    """How many seeds solved it and when, or the accuracies at the end where none did."""
    epochs = [epoch for result in results if (epoch := solved_at(result)) is not None]
    share = f"{len(epochs)} of {len(results)} seeds"
    if epochs:
        return f"{share}, at epoch {', '.join(map(str, sorted(epochs)))}"
    last = [result["looks"][-1] for result in results]
    accuracies = ", ".join(format(look["accuracy"], ".3f") for look in last)
    return f"{share}; accuracy {accuracies} at epoch {last[0]['epoch']}"


def verdict(name: str, k: int, results: Sequence[dict[str, Any]]) -> str:
    """Against the paper's: a cell in which seeds differ is told as their share."""
    if name not in PUBLISHED:
        return ""
    solved = sum(solved_at(result) is not None for result in results)
    if 0 < solved < len(results):
        return f"depends on the seed: solved by {solved} of {len(results)}"
    return "reproduced" if bool(solved) == PUBLISHED[name][k] else "not reproduced"


def page(results: Sequence[dict[str, Any]]) -> str:
    parts = []
    for rows in sorted({result["rows"] for result in results}):
        lines = [["training", "k", "the paper", "here", "verdict"], ["---"] * 5]
        for name in METHODS:
            for k in RATES:
                own = [one for one in results if (one["method"], one["k"], one["rows"]) == (name, k, rows)]
                if own:
                    paper = {True: "solved", False: "not solved", None: ""}[PUBLISHED.get(name, {}).get(k)]
                    lines.append([name, str(k), paper, cell(own), verdict(name, k, own)])
        parts += [f"## {rows:,} rows", "", markdown(lines), ""]
    seconds = [result["seconds"] for result in results]
    machines = ", ".join(sorted({result["machine"] for result in results}))
    return "\n".join(
        [
            "# k-parity with intermediate steps: twelve cells",
            "",
            "    python -m benchmarks.parity --output outputs/parity --publish docs/results/parity",
            "",
            "k hidden bits of 64, the one-layer model of [Kim and Suzuki](https://arxiv.org/abs/2410.08633), gradient",
            "descent on all rows, at most 1,000 epochs. Solved: all 5,000 test rows right, at every look from an epoch",
            "on, each answered from the model's own intermediate steps. The paper: 350 epochs on 100,000 rows.",
            "",
            "Chain of thought computes a level from its own level below; detached, which the paper does not have, it",
            "gives that no gradient. Self-consistency holds a level at 0 until the one below has found its inputs.",
            "",
            *parts,
            f"{len(results)} runs of {min(seconds):.0f} to {max(seconds):.0f} s, beside other programs, on {machines}.",
        ]
    )
