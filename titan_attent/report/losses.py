"""The loss against steps, tokens and seconds.

Of one run both losses share a row. Of several runs there is a row for the validation loss and one for the training
loss; a dashed line shows the first run's final validation loss, and a star where each run first reached it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from titan_attent.report.runs import TRAIN, VALIDATION, Axis, RunScalars
from titan_attent.report.saving import Reached, reach, saved_percent, target_loss
from titan_attent.report.style import mark_resumes, not_logged, smoothed, title, x_axis
from titan_attent.report.summary import AXES, saving_text

NAMES = {TRAIN: "training loss, nats a token, smoothed", VALIDATION: "validation loss, nats a token"}
DOTS: Any = {"marker": "o", "markersize": 4.5, "linewidth": 0.9}
STAR: Any = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "markeredgewidth": 0.7, "linestyle": ""}
LONG = 2 * 3600.0  # seconds of a run that is shown in hours


def num_rows(runs: Sequence[RunScalars]) -> int:
    return 1 if len(runs) == 1 else 2


def draw_losses(grid: Sequence[Sequence[Axes]], runs: Sequence[RunScalars]) -> None:
    """``grid``: :func:`num_rows` rows of three axes."""
    target = target_loss(runs[0]) if len(runs) > 1 else None
    reached = [reach(run, target) for run in runs]
    hours = max(run.wall_seconds for run in runs) > LONG
    rows = [(TRAIN, VALIDATION)] if len(runs) == 1 else [(VALIDATION,), (TRAIN,)]
    for tags, row in zip(rows, grid, strict=True):
        for axis, axes in zip(AXES, row, strict=True):
            label, scale = {"step": "step", "tokens": "tokens trained", "seconds": "seconds"}[axis], 1.0
            if axis == "seconds" and hours:
                label, scale = "hours", LONG / 2
            drawn = [_curve(axes, run, i, tag, axis, scale, len(runs)) for tag in tags for i, run in enumerate(runs)]
            if not any(drawn):
                not_logged(axes)
            mark_resumes(axes, runs, axis, scale)
            entries = _entries(runs) if len(runs) == 1 else []
            if VALIDATION in tags and target is not None and reached[0] is not None:
                entries += _saving(axes, runs, reached, target, axis, scale)
            title(axes, NAMES[tags[0]] if len(tags) == 1 else "loss, nats a token", entries)
            x_axis(axes, label)
            ends = [max(x[-1:], default=0.0) for x in (run.along(axis, tag)[0] for run in runs for tag in NAMES)]
            if last := max(ends) / scale:
                axes.set_xlim(-0.03 * last, 1.03 * last)
        _limit(row, runs, tags, target)


def _curve(axes: Axes, run: RunScalars, i: int, tag: str, axis: Axis, scale: float, num_runs: int) -> bool:
    x, values = run.along(axis, tag)
    finite = np.isfinite(values)
    x, values = x[finite] / scale, values[finite]
    color = f"C{i if num_runs > 1 else int(tag == VALIDATION)}"
    if tag == TRAIN:
        axes.plot(x, values, color=color, linewidth=0.6, alpha=0.3)
        axes.plot(x, smoothed(values), color=color, marker="o" if len(x) < 3 else "", markersize=4)
    else:
        axes.plot(x, values, color=color, linestyle=":" if num_runs == 1 else "-", **DOTS)
    return len(x) > 0


def _entries(runs: Sequence[RunScalars]) -> list[Line2D]:
    lines = {
        TRAIN: Line2D([], [], color="C0", label="training, smoothed"),
        VALIDATION: Line2D([], [], color="C1", label="validation", linestyle=":", **DOTS),
    }
    return [line for tag, line in lines.items() if any(tag in run.scalars for run in runs)]


def _saving(
    axes: Axes, runs: Sequence[RunScalars], reached: Sequence[Reached | None], target: float, axis: Axis, scale: float
) -> list[Line2D]:
    """Draw the line and the stars; returns their entries for the legend."""
    axes.axhline(target, color="0.35", linestyle="--", linewidth=1.0, zorder=1)
    entries = [Line2D([], [], color="0.35", linestyle="--", linewidth=1.0, label="end of the first run")]
    base = reached[0]
    assert base is not None
    for i, own in enumerate(reached):
        if own is None:
            if VALIDATION in runs[i].scalars:
                entries.append(Line2D([], [], color=f"C{i}", linestyle="", marker="x", label="not reached"))
            continue
        cost, saved = own.cost(axis), saved_percent(own, base, axis)
        if cost is not None:
            axes.plot([cost / scale], [target], color=f"C{i}", zorder=5, **STAR)
        if i and saved is not None:
            label = ("" if own.between else "at least ") + saving_text(saved)
            entries.append(Line2D([], [], color=f"C{i}", label=label, **(STAR | {"markersize": 11})))
    return entries


def _limit(row: Sequence[Axes], runs: Sequence[RunScalars], tags: Sequence[str], target: float | None) -> None:
    """One scale for a row, without the first losses, which would flatten the others."""
    early = 5 if tags == (VALIDATION,) else 20  # one in so many steps
    settled = [np.array([target] if VALIDATION in tags and target is not None and np.isfinite(target) else [])]
    for tag, run in ((tag, run) for tag in tags for run in runs):
        steps, values = run.series(tag)
        settled.append(values[np.isfinite(values) & (steps >= run.last_step / early)])
    shown = np.concatenate(settled)
    if len(shown):
        margin = 0.05 * np.ptp(shown) or 0.1
        for axes in row:
            axes.set_ylim(shown.min() - margin, shown.max() + margin)
