"""Helpers that the panels share: colors, titles with legends, the x axis, smoothing, marks of resumes."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from titan_attent.report.runs import Axis, RunScalars

# Okabe and Ito's colors, which color-blind people can distinguish, without yellow, and two of ColorBrewer's. The light
# colors are Paul Tol's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B3294", "#8C510A")
LIGHT_COLORS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
REST_COLOR = "#DDDDDD"
LEGEND_WIDTH, LEGEND_HANDLE = 60, 6  # in characters: width of a panel, and of a label's line sample


def settings(num_colors: int) -> Any:
    """matplotlib's settings for the picture; the color cycle has at least ``num_colors`` colors."""
    colors = list(COLORS)
    if num_colors > len(colors):
        colors = [
            matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, num_colors))
        ]
    sizes = {"font.size": 12.0, "axes.titlesize": 14.0}
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    return sizes | spines | {"axes.prop_cycle": cycler(color=colors), "legend.frameon": False}


def title(axes: Axes, text: str, entries: Sequence[Artist]) -> None:
    """Set the title and, between it and the curves, a legend of ``entries`` in as many columns as fit."""
    many = len(entries) > 4
    widths = [len(str(entry.get_label())) + LEGEND_HANDLE for entry in entries]

    def fits(columns: int) -> bool:
        filled = np.array_split(widths, columns)  # a legend fills its columns in this way
        return sum(max(column) for column in filled) <= LEGEND_WIDTH * (1.1 if many else 1)

    columns = next((n for n in range(len(entries), 1, -1) if fits(n)), 1)
    rows = -(-len(entries) // columns)
    if entries:
        spacing: Any = {"columnspacing": 1.2, "handletextpad": 0.6, "handlelength": 1.8, "labelspacing": 0.3}
        where: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "borderaxespad": 0.2}
        legend = axes.legend(handles=list(entries), ncols=columns, fontsize=10 if many else 11, **where, **spacing)
        legend.set_in_layout(False)  # the title leaves room for it, and its width must not narrow the axes
    axes.set_title(text, pad=8 + (15 if many else 16.5) * rows)


def x_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)


def not_logged(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", fontsize=14, color="0.5")
    axes.set_yticks([])


def mark_resumes(axes: Axes, runs: Sequence[RunScalars], axis: Axis, scale: float = 1.0) -> None:
    """Draw a dotted vertical line where each session after the first starts."""
    for i, run in enumerate(runs):
        for start in run.starts(axis)[1:]:
            axes.axvline(start / scale, color="0.5" if len(runs) == 1 else f"C{i}", linestyle=":", linewidth=0.9)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Moving means over a 25th of the values, centered except near the ends."""
    half, n = len(values) // 50, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(0, n - half), np.minimum(n + np.minimum(half, n) + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
