"""The loss, and the accuracy of runs that have one, against steps, tokens and seconds.

With one run, both losses share a row, and so do both accuracies. With several runs there is a row for the validation
loss, one for the accuracy and one for the training loss. A dashed line marks the level at which the first run ended. A
star marks where each run reached it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from titan_attent.report.comparing import Comparison, compare
from titan_attent.report.runs import TOKEN_ACCURACY, TOP5, TRAIN, VALIDATION, VOTE, Axis, RunScalars
from titan_attent.report.saving import LOSS, MATCH, MEASURES, TOP1, measures_of
from titan_attent.report.sentence import short
from titan_attent.report.style import mark_resumes, not_logged, smoothed, title, x_axis
from titan_attent.report.summary import AXES

DOTS: Any = {"marker": "o", "markersize": 4.5, "linewidth": 0.9}
STAR: Any = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "markeredgewidth": 0.7, "linestyle": ""}
MAX_IN_SECONDS = 2 * 3600.0  # longer runs are shown in hours
# The color and the label of each tag where one run is drawn.
SINGLE_RUN_STYLES = {
    TRAIN: ("C0", "training, smoothed"),
    VALIDATION: ("C1", "validation"),
    TOP1.tag: ("C1", "top-1"),
    TOP5: ("C2", "top-5"),
    MATCH.tag: ("C1", "exact match"),
    TOKEN_ACCURACY: ("C2", "of the tokens"),
    VOTE: ("C3", "of the seeds' vote"),
}


def rows_of(runs: Sequence[RunScalars]) -> list[tuple[str, ...]]:
    """The tags in each row of three axes."""
    measures = measures_of(runs)
    if len(runs) == 1:
        votes = (VOTE,) if VOTE in runs[0].scalars else ()
        beside: dict[Any, tuple[str, ...]] = {TOP1: (TOP5,), MATCH: (TOKEN_ACCURACY, *votes)}
        return [(TRAIN, VALIDATION), *((measure.tag, *beside[measure]) for measure in measures if measure in beside)]
    return [*((measure.tag,) for measure in measures), (TRAIN,)]


def draw_losses(grid: Sequence[Sequence[Axes]], runs: Sequence[RunScalars]) -> None:
    """``grid``: a row of three axes for each of :func:`rows_of`."""
    hours = max(run.wall_seconds for run in runs) > MAX_IN_SECONDS
    images = all(run.is_of_images for run in runs)
    labels = {"step": "step", "tokens": f"tokens trained{' (patches)' * images}", "seconds": "seconds"}
    for tags, row in zip(rows_of(runs), grid, strict=True):
        measure = next((m for m in MEASURES if tags == (m.tag,)), None)  # None for rows without a comparison
        comparisons = [] if measure is None else [compare(runs[0], run, measure) for run in runs]
        target = comparisons[0].target if comparisons else None
        for axis, axes in zip(AXES, row, strict=True):
            label, scale = labels[axis], 1.0
            if axis == "seconds" and hours:
                label, scale = "hours", 3600.0
            drawn = [_curve(axes, run, i, tag, axis, scale, len(runs)) for tag in tags for i, run in enumerate(runs)]
            if not any(drawn):
                not_logged(axes)
            mark_resumes(axes, runs, axis, scale)
            entries = _entries(runs[0], tags) if len(runs) == 1 else []
            if len(runs) > 1 and comparisons:
                entries += _saving(axes, comparisons, axis, scale)
            title(axes, _title(tags, runs), entries)
            x_axis(axes, label)
            if {TOP1.tag, MATCH.tag} & {*tags} and any(drawn):
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            ends = [max(run.along(axis, tag)[0][-1:], default=0.0) for run in runs for tag in (TRAIN, VALIDATION)]
            if last := max(ends) / scale:
                axes.set_xlim(-0.03 * last, 1.03 * last)
        _limit(row, runs, tags, target)


def _title(tags: tuple[str, ...], runs: Sequence[RunScalars]) -> str:
    for measure in (TOP1, MATCH):
        if measure.tag in tags:
            return measure.name
    units = {run.loss_unit for run in runs} - {None}
    unit = f", {units.pop()}" if len(units) == 1 else ""
    if len(tags) > 1:
        return f"loss{unit}"
    return f"{LOSS.name}{unit}" if tags == (VALIDATION,) else f"training loss{unit}, smoothed"


def _curve(axes: Axes, run: RunScalars, i: int, tag: str, axis: Axis, scale: float, num_runs: int) -> bool:
    x, values = run.along(axis, tag)
    finite = np.isfinite(values)
    x, values = x[finite] / scale, values[finite]
    color = f"C{i}" if num_runs > 1 else SINGLE_RUN_STYLES[tag][0]
    if tag == TRAIN:
        axes.plot(x, values, color=color, linewidth=0.6, alpha=0.3)
        axes.plot(x, smoothed(values), color=color, marker="o" if len(x) < 3 else "", markersize=4)
    else:
        axes.plot(x, values, color=color, linestyle=":" if num_runs == 1 else "-", **DOTS)
    return len(x) > 0


def _entries(run: RunScalars, tags: Sequence[str]) -> list[Line2D]:
    styles = {tag: {} if tag == TRAIN else {"linestyle": ":"} | DOTS for tag in tags}
    return [
        Line2D([], [], color=color, label=label, **styles[tag])
        for tag, (color, label) in SINGLE_RUN_STYLES.items()
        if tag in tags and tag in run.scalars
    ]


def _saving(axes: Axes, comparisons: Sequence[Comparison], axis: Axis, scale: float) -> list[Line2D]:
    """Draw the dashed line and the stars; returns their legend entries."""
    target = comparisons[0].target
    if target is None or comparisons[0].base is None:
        return []
    axes.axhline(target, color="0.35", linestyle="--", linewidth=1.0, zorder=1)
    entries = [Line2D([], [], color="0.35", linestyle="--", linewidth=1.0, label="end of the first run")]
    for i, one in enumerate(comparisons):
        color = f"C{i}"
        if one.incomparable:
            entries += [Line2D([], [], color=color, linestyle="", marker="x", label="not compared")] * bool(i)
        elif one.own is None:
            entries.append(Line2D([], [], color=color, linestyle="", marker="x", label="not reached"))
        else:
            cost = one.own.cost(axis)
            if cost is not None:
                axes.plot([cost / scale], [target], color=color, zorder=5, **STAR)
            label = "reached" if axis == "step" else short(one.savings.get(axis)) or "reached"
            if i:
                entries.append(Line2D([], [], color=color, label=label, **(STAR | {"markersize": 11})))
    return entries


def _limit(row: Sequence[Axes], runs: Sequence[RunScalars], tags: Sequence[str], target: float | None) -> None:
    """Set one y scale for a row, ignoring the first values, which would flatten the curves."""
    early = 20 if TRAIN in tags else 5  # the first 1 / early of the steps is ignored
    settled = [np.array([target] if target is not None and np.isfinite(target) else [])]
    for tag, run in ((tag, run) for tag in tags for run in runs):
        steps, values = run.series(tag)
        settled.append(values[np.isfinite(values) & (steps >= run.last_step / early)])
    shown = np.concatenate(settled)
    if len(shown):
        margin = 0.05 * np.ptp(shown) or 0.1
        for axes in row:
            axes.set_ylim(shown.min() - margin, shown.max() + margin)
