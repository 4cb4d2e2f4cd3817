"""The picture of the cheaper-steps benchmark: validation loss against FLOPs and against seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cheaper_steps.rules import CONTROL, RULES
from titan_attent.report.picture import write_whole
from titan_attent.report.style import COLORS, settings, x_axis

DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
DPI = 100
WIDTH, HEIGHT = 15.0, 6.0
"""Inches; the height is that of one row."""
ALONG = {"flops": "FLOPs spent, in steps of exact backpropagation", "seconds": "seconds of training"}
TITLES = {"modules": "[freezing]: fewer modules updated", "highway": "[highway]: a shorter way for the gradient"}


def points(run: Mapping[str, Any], along: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, validation losses) of a run, both fp64 [n]; the first validation, before training, is left out.

    x is the cost up to a validation: for ``along`` "flops" in exact steps, for "seconds" in seconds of training.
    """
    steps = np.array([step for step in run["validation_loss"] if step > 1], dtype=float)
    losses = np.array([loss for step, loss in run["validation_loss"].items() if step > 1])
    known = run["saved_at"] if along == "flops" else run["seconds_at"]
    values = np.interp(steps, list(known), list(known.values()))
    return (steps * (1 - values) if along == "flops" else values), losses


def draw_curves(results: Mapping[str, Mapping[int, Mapping[str, Any]]], path: Path) -> None:
    """Draw one row per method, with the control of both, and one line per rule, the mean over its seeds.

    Nothing is drawn without runs. A control with fewer steps is drawn as its end only: its learning rate falls earlier.
    """
    methods = [method for method in TITLES if any(RULES[name].method == method for name in results)]
    if not methods:
        return
    with matplotlib.rc_context(settings(len(COLORS))):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(methods)), dpi=DPI, layout="constrained")
        for row, method in enumerate(methods):
            names = [name for name in results if RULES[name].method in ("", method)]
            for column, (along, label) in enumerate(ALONG.items()):
                axes = figure.add_subplot(len(methods), 2, 1 + 2 * row + column)
                for number, name in enumerate(names):
                    _draw(axes, name, [points(run, along) for run in results[name].values()], number)
                _limit(axes)
                x_axis(axes, label)
                axes.set_title(TITLES[method], loc="left")
                if along == "flops":
                    axes.set_ylabel("validation loss, nats per token")
                else:
                    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=11)
        figure.suptitle("Validation loss against what was spent: mean over the seeds, probes charged")
        write_whole(path, lambda file: figure.savefig(file, format="png"))


def _draw(axes: Axes, name: str, curves: list[tuple[np.ndarray, np.ndarray]], number: int) -> None:
    x, y = (np.mean([curve[i] for curve in curves], axis=0) for i in (0, 1))
    if name == CONTROL:
        axes.plot(x, y, color="0.25", linewidth=2.6, marker="o", markersize=5, label=name, zorder=3)
        return
    style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
    if RULES[name].follows:
        axes.plot(x[-1:], y[-1:], linestyle="", markersize=11, markerfacecolor="none", label=name, **style)
        return
    dashes = DASHES[number // len(COLORS)]
    axes.plot(x, y, linestyle=dashes, linewidth=1.6, markersize=5, label=name, **style)


def _limit(axes: Axes) -> None:
    """Limit the axes to the ends of the rules: the first validations are far above, and would flatten the curves."""
    lines = [np.asarray(line.get_xydata()) for line in axes.get_lines()]
    ends = [line[-1, 1] for line in lines]
    low, high = min(ends), max(ends)
    room = max(high - low, 0.02 * low)
    top = high + 1.5 * room
    shown = np.concatenate([line[line[:, 1] <= top] for line in lines])
    left, right = shown[:, 0].min(), max(line[-1, 0] for line in lines)
    pad = 0.05 * max(right - left, 0.1 * right)
    axes.set_ylim(low - 0.15 * room, min(top, shown[:, 1].max() + 0.3 * room))
    axes.set_xlim(left - pad, right + pad)
