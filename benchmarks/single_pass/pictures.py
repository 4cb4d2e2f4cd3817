"""The pictures of the single-pass experiment, 1,400 pixels wide: loss curves, and final differences to uniform.

Colors are Okabe and Ito's, which color-blind people can distinguish; every rule has its own marker, too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.common.intervals import half_width
from benchmarks.common.tables import by_cell, mean
from benchmarks.single_pass.corpora import CORPORA
from benchmarks.single_pass.numbers import Losses, Result, all_losses, columns_of, curve, paired
from benchmarks.single_pass.rules import RULES
from titan_attent.report.picture import write_whole
from titan_attent.report.style import COLORS

DPI = 100
WIDTH = 14.0
"""Inches."""
SETTINGS = {"font.size": 11.0, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
SHORTER = ("difference_87", "difference_67", "difference_55")
LOOKS = {
    "uniform": ("0.35", "o"),
    "difference": (COLORS[0], "o"),
    "difference_87": (COLORS[5], "^"),
    "difference_67": (COLORS[5], "s"),
    "difference_55": (COLORS[5], "v"),
    "top_67": (COLORS[5], "d"),
    "dedup_67": (COLORS[5], "p"),
    "attainment": (COLORS[1], "D"),
    "dedup": (COLORS[2], "P"),
    "perplexity": (COLORS[3], "X"),
}
"""Rule -> color, marker."""


def draw_curves(results: Sequence[Result], path: Path) -> None:
    """Validation loss against steps, one panel per corpus: the mean over the seeds, and a thin line per seed.

    The first validation, before training, is left out.
    """
    cells = by_cell(results, lambda result: {step: loss for step, loss in curve(result).items() if step > 1})

    def draw(axes: Axes, corpus: str) -> None:
        for rule in ("uniform", "difference", "difference_87" if corpus == "web" else "difference_67", "attainment"):
            curves = list(cells.get((rule, corpus), {}).values())
            if not curves:
                continue
            color, marker = LOOKS[rule]
            dashes = "--" if rule in SHORTER else "-"
            for own in curves:
                axes.plot(list(own), list(own.values()), color=color, linestyle=dashes, linewidth=0.7, alpha=0.5)
            steps = sorted(set.intersection(*(set(own) for own in curves)))
            means = [mean(own[step] for own in curves) for step in steps]
            axes.plot(steps, means, color=color, linestyle=dashes, linewidth=2, marker=marker, markersize=5, label=rule)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.grid(alpha=0.25)

    corpora = [corpus for corpus in CORPORA if any(corpus == key[1] for key in cells)]
    panels(corpora, draw, path, height=3.2, title="Validation loss (nats per token) against steps", legend=True)


def draw_differences(results: Sequence[Result], path: Path) -> None:
    """The paired difference to uniform's final loss with its 95% interval: a panel per table column, a row per rule.

    The axis of a panel includes all means; intervals may end outside of it.
    """
    losses = all_losses(results)
    rules = [rule for rule in RULES if rule != "uniform" and any(rule == key[0] for key in losses)]
    columns = [column for column in columns_of(losses) if any(paired(losses, rule, column) for rule in rules)]

    def draw(axes: Axes, column: str) -> None:
        draw_rules(axes, losses, rules, column)

    title = "Final validation loss minus uniform's (nats per token): left of 0 is better"
    panels(columns, draw, path, height=0.9 + 0.3 * len(rules), title=title, share_rows=True)


def draw_rules(axes: Axes, losses: Losses, rules: Sequence[str], column: str) -> None:
    axes.axvline(0, color="0.35", linewidth=1)
    shown, widths = [0.0], [0.0]
    for row, rule in enumerate(rules):
        differences = paired(losses, rule, column)
        if not differences:
            continue
        at, width, (color, marker) = mean(differences), half_width(differences), LOOKS[rule]
        interval = {"xerr": [width], "capsize": 3} if len(differences) > 1 else {}
        axes.errorbar([at], [row], color=color, marker=marker, markersize=8, linewidth=1.8, **interval)
        shown.append(at)
        widths += [width] if interval else []
    low, high = min(shown), max(shown)
    pad = max(0.12 * (high - low) + min(max(widths), high - low), 0.005)
    axes.set_xlim(low - pad, high + pad)
    axes.set_ylim(len(rules) - 0.5, -0.5)
    axes.set_yticks(range(len(rules)), rules)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.grid(alpha=0.25)


def panels(
    names: Sequence[str],
    draw: Callable[[Axes, str], None],
    path: Path,
    *,
    height: float,
    title: str,
    legend: bool = False,
    share_rows: bool = False,
) -> None:
    """Write a PNG with one panel per name, four in a row, ``height`` inches each; nothing without a name."""
    if not names:
        return
    columns, rows = min(4, len(names)), -(-len(names) // 4)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, height * rows + (0.9 if legend else 0.5)), dpi=DPI, layout="constrained")
        cells = [figure.add_subplot(rows, columns, 1 + i) for i in range(len(names))]
        for i, (axes, name) in enumerate(zip(cells, names, strict=True)):
            draw(axes, name)
            axes.set_title(name, fontweight="bold")
            if share_rows and i % columns:
                axes.tick_params(labelleft=False)
        if legend:
            handles = {label: h for axes in cells for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            order = sorted(handles, key=list(RULES).index)
            figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=len(order))
        figure.suptitle(title)
        write_whole(path, lambda file: figure.savefig(file, format="png"))
