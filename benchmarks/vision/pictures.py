"""The picture of the vision experiment: accuracy against compute, one panel per condition, 1,400 pixels wide.

The gray line is uniform, decayed at each compute: a rule above it saves compute. Colors are those of the report; every
rule has its own marker, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.vision.numbers import Result, Runs
from benchmarks.vision.rules import CONDITIONS, RULES
from titan_attent.report.picture import write_whole
from titan_attent.report.style import COLORS, settings

DPI = 100
SIZE = (14.0, 9.0)
"""Inches."""
LOOKS = {
    "random": (COLORS[7], "v"),
    "hard": (COLORS[1], "s"),
    "soft": (COLORS[4], "^"),
    "threshold": (COLORS[3], "P"),
    "paper": (COLORS[6], "X"),
    "paper_soft": (COLORS[6], "D"),
    "attainment": (COLORS[2], "o"),
    "attainment_half": (COLORS[2], ">"),
    "functional_gradient": (COLORS[5], "<"),
    "excess": (COLORS[0], "p"),
    "scorers": (COLORS[0], "*"),
}
"""Rule without its compute -> color, marker."""
STEP = 0.011
"""Horizontal distance between rules of the same compute, as a share of the compute."""
MAX_BELOW_BEST = 0.12
"""Accuracies that are lower than the best by more than this are drawn at the lower edge."""
TITLES = {
    "clean": "clean",
    "wrong_labels": "20% of the labels wrong",
    "copies": "half are copies of 64",
    "long_tail": "long tail",
}


def draw_accuracy(results: Sequence[Result], path: Path) -> None:
    """Write the PNG of the results of one set; nothing without results."""
    if not results:
        return
    name = results[0]["set"]
    panels = [runs for condition in CONDITIONS if (runs := Runs(results, name, condition)).rules]
    with matplotlib.rc_context(settings(len(COLORS))):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        rows = -(-len(panels) // 2)
        cells = [figure.add_subplot(rows, min(2, len(panels)), 1 + i) for i in range(len(panels))]
        for axes, runs in zip(cells, panels, strict=True):
            draw(axes, runs)
        handles = {label: h for axes in cells for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        order = [label for label in ("uniform", *LOOKS) if label in handles]
        figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=5)
        seeds = len({result["seed"] for result in results})
        figure.suptitle(
            f"{name}: final accuracy, mean of {seeds} seeds, against compute. Bars: 95% of the difference to uniform"
        )
        write_whole(path, lambda file: figure.savefig(file, format="png"))


def draw(axes: Axes, runs: Runs) -> None:
    """Draw one condition. Rules far below the best are drawn at the lower edge, with their accuracy as a number."""
    controls = [rule for rule in runs.rules if RULES[rule].teacher["strategy"] == "uniform"]
    line = sorted((runs.compute(rule), found.mean) for rule in controls if (found := runs.values(rule)))
    if line:
        axes.plot(*zip(*line, strict=True), color="0.45", marker="o", linewidth=2, label="uniform", zorder=1)
        axes.axhline(line[-1][1], color="0.45", linestyle=":", linewidth=1, zorder=0)
    rivals = {rule: found for rule in runs.rules if rule not in controls and (found := runs.values(rule))}
    heights = [height for _, height in line] + [found.mean for found in rivals.values()]
    high = max(heights)
    low = min(height for height in heights if height >= high - MAX_BELOW_BEST)
    bars = {
        rule: found.half
        for rule in rivals
        if rivals[rule].mean >= low and (found := runs.difference(rule, "uniform")) is not None and found.n > 1
    }
    ends = [rivals[rule].mean + sign * half for rule, half in bars.items() for sign in (-1, 1)]
    bottom, top = min([low, *ends]), max([high, *ends])
    num_below = 0
    pad = 0.1 * (top - bottom) + 0.001
    edge = bottom - pad
    by_compute: dict[float, list[str]] = {}
    for rule in rivals:
        by_compute.setdefault(RULES[rule].share, []).append(rule)
    for compute, rules in by_compute.items():
        for i, rule in enumerate(rules):
            kind = rule.rsplit("_", 1)[0]
            color, marker = LOOKS[kind]
            # Side by side, around their share of the compute.
            x, y = compute + STEP * (i - (len(rules) - 1) / 2), rivals[rule].mean
            bar: Any = {}
            if y < low:
                below: Any = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 9}
                axes.annotate(f"{y:.0%}", (x, edge), (0, -7 - 10 * (num_below % 2)), **below)
                y, num_below = edge, num_below + 1
            elif rule in bars:
                bar = {"yerr": [bars[rule]], "capsize": 2, "elinewidth": 1}
            axes.errorbar([x], [y], color=color, marker=marker, markersize=9, linestyle="", label=kind, **bar)
    axes.set_xlim(0.47, 1.03)
    axes.set_ylim(bottom - 2.5 * pad if num_below else bottom - pad, top + pad)
    axes.set_title(TITLES[runs.condition])
    axes.set_xlabel("compute, as a share of uniform's")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(lambda height, _: f"{100 * height:.4g}%")
    axes.grid(alpha=0.25)
