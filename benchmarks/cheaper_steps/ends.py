"""The picture of the cheaper-steps results: where every rule ended, beside training fewer steps.

    python -m benchmarks.cheaper_steps.ends docs/results/cheaper_steps.json docs/results/cheaper_steps.png

It needs the committed results alone, where curves.py needs the runs.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cheaper_steps.curves import DPI, MARKERS, TITLES
from benchmarks.cheaper_steps.rules import CONTROL, RULES
from titan_attent.report.picture import write_whole
from titan_attent.report.style import COLORS, settings, x_axis

WIDTH, HEIGHT = 15.0, 6.0
"""Inches."""


def end(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """FLOPs spent, in steps of exact backpropagation; nats per token from the control; half of that's interval."""
    return row["steps"] * (1 - row["of_step"]), row.get("difference", 0.0), row.get("half_width") or 0.0


def draw_ends(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw one panel per method: rules as points, and a line through the controls of fewer steps.

    Args:
        rows: those of :func:`benchmarks.cheaper_steps.table.rows_of`; without one of a method nothing is drawn.
    """
    methods = [method for method in TITLES if any(RULES[name].method == method for name in rows)]
    if not methods or CONTROL not in rows:
        return
    with matplotlib.rc_context(settings(len(COLORS))):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        for column, method in enumerate(methods):
            axes = figure.add_subplot(1, len(methods), 1 + column)
            _fewer_steps(axes, rows)
            names = [name for name in rows if RULES[name].method == method and not RULES[name].follows]
            for number, name in enumerate(names):
                x, y, half = end(rows[name])
                look: Any = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
                hollow = {"markerfacecolor": "white"} if number >= len(COLORS) else {}
                axes.errorbar(x, y, yerr=half, linestyle="", markersize=8, capsize=3, label=name, **look, **hollow)
            x_axis(axes, "FLOPs spent, in steps of exact backpropagation")
            axes.set_title(TITLES[method], loc="left")
            axes.set_ylabel("final validation loss, nats per token from exact")
            axes.legend(loc="upper right", fontsize=10)
        figure.suptitle("Below the line a rule would pay: means over the seeds with 95% intervals, probes charged")
        write_whole(path, lambda file: figure.savefig(file, format="png"))


def _fewer_steps(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The control and those of fewer steps, each decayed at its own end, along their FLOPs."""
    names = [name for name in rows if name == CONTROL or RULES[name].follows]
    ends = sorted({end(rows[name]) for name in names})
    x, y, half = zip(*ends, strict=True)
    axes.errorbar(x, y, yerr=half, color="0.25", linewidth=2.2, marker="o", capsize=3, label="exact, fewer steps")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cheaper_steps.ends", description="Draw the results.")
    parser.add_argument("results", type=Path, help="table.json of a call, or the committed cheaper_steps.json")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    args = parser.parse_args(argv)
    try:
        rows = json.loads(args.results.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{args.results}: not the results of this benchmark ({type(error).__name__}: {error})")
    draw_ends(rows, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
