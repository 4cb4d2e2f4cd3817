"""The panels of the systems, and those on time and speed.

With one run, each tag has a color. With several, each run has a color and each tag a dash pattern.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from titan_attent.report.maps import draw_map
from titan_attent.report.runs import IMAGE_SPEED, SPEED, SPEEDS, WALL, RunScalars
from titan_attent.report.style import LIGHT_COLORS, REST_COLOR, mark_resumes, smoothed, title, x_axis
from titan_attent.report.summary import ACCOUNTS, shown_members
from titan_attent.report.systems import logged_by
from titan_attent.systems.system import Panel

TIME = "where the time went"
GENERAL_PANELS: tuple[Panel, ...] = (
    Panel(TIME),
    Panel("tokens/s/device, smoothed", (SPEED,), from_zero=True),
    Panel("images/s/device, smoothed", (IMAGE_SPEED,), from_zero=True),
    Panel("overhead of teaching, % of wall time", ("ledger/overhead_percent",), from_zero=True),
)
STYLES: tuple[Any, ...] = ("-", "--", "-.")


def panels_of(runs: Sequence[RunScalars]) -> list[Panel]:
    """The panels for which a run has something to draw: those of the systems, then the general ones.

    Only one of the two speeds is shown: images where all runs have them, else tokens.
    """
    of_systems = [panel for logged in logged_by(runs) for panel in logged.panels]
    other_speed = SPEED if all(run.is_of_images for run in runs) else IMAGE_SPEED

    def shows(panel: Panel) -> bool:
        if other_speed in panel.tags:
            return False
        if panel.map:
            return any(tag.startswith(str(panel.family)) for run in runs for tag in run.scalars)
        if panel.family:
            return bool(shown_members(runs, panel.family)[0])
        if panel.title == TIME:
            return any(len(run.series(WALL)[0]) for run in runs)
        if not panel.tags:
            return False
        values = np.concatenate([run.series(tag)[1] for run in runs for tag in panel.tags])
        return bool(np.any(np.isfinite(values) & ((values != 0) if panel.when_not_zero else True)))

    return [panel for panel in (*of_systems, *GENERAL_PANELS) if shows(panel)]


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunScalars], names: Sequence[str]) -> None:
    """Draw one panel. ``names``: the names of the runs."""
    if panel.map:
        draw_map(axes, panel, runs, names)
    elif panel.family:
        _draw_family(axes, panel.title, panel.family, runs)
    elif panel.title == TIME:
        _draw_time(axes, runs, names)
    else:
        _draw_tags(axes, panel, runs)


def _draw_tags(axes: Axes, panel: Panel, runs: Sequence[RunScalars]) -> None:
    """Draw tags against steps; ``panel.right`` has an axis of its own."""
    labels, entries = dict(panel.labels), []
    for j, tag in enumerate(panel.tags):
        target = axes
        drawn = [(i, *run.series(tag)) for i, run in enumerate(runs) if len(run.series(tag)[0])]
        if tag == panel.right and drawn:
            target = axes.twinx()
            target.spines["right"].set_visible(True)
            whole = all(np.all(values[np.isfinite(values)] % 1 == 0) for _, _, values in drawn)
            target.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole, min_n_ticks=1))
        for i, steps, values in drawn:
            color, finite = f"C{j if len(runs) == 1 else i}", np.isfinite(values)
            dashes = STYLES[j % len(STYLES)]
            steps, values = steps[finite], values[finite]
            if tag in SPEEDS:
                axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
                values = smoothed(values)
            # A value that a decision logs holds until the next decision.
            drawstyle = "default" if tag in SPEEDS or tag.startswith("ledger/") else "steps-post"
            marker = "o" if len(steps) < 3 else ""
            target.plot(steps, values, color=color, linestyle=dashes, marker=marker, ms=4, drawstyle=drawstyle)
        if drawn and len(panel.tags) > 1:
            color, label = f"C{j}" if len(runs) == 1 else "0.25", tag.split("/")[-1].replace("_", " ")
            entries.append(Line2D([], [], color=color, linestyle=STYLES[j % len(STYLES)], label=labels.get(tag, label)))
    _step_axis(axes, runs)
    title(axes, panel.title, entries)
    if panel.shares:
        axes.set_ylim(-0.05, 1.05)
    elif panel.from_zero:
        values = np.concatenate([run.series(tag)[1] for run in runs for tag in panel.tags])
        axes.set_ylim(0, 1.08 * max(values[np.isfinite(values)]) or 1)
    if panel.counts:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _step_axis(axes: Axes, runs: Sequence[RunScalars]) -> None:
    x_axis(axes, "step (dotted: resumed)" if any(len(run.session_starts) > 1 for run in runs) else "step")
    mark_resumes(axes, runs, "step")
    last = max(run.last_step for run in runs)
    axes.set_xlim(-0.03 * last, 1.03 * last)


def _draw_family(axes: Axes, name: str, family: str, runs: Sequence[RunScalars]) -> None:
    """Draw a family of tags: lines against steps for one run; for several, one bar per run and tag, the mean over the
    decisions."""
    shown, rest = shown_members(runs, family)
    if len(runs) == 1:
        series = {member: dict(zip(*runs[0].series(family + member), strict=True)) for member in (*shown, *rest)}
        lines = [(_short(member), list(series[member]), list(series[member].values())) for member in shown]
        if rest:
            steps = sorted({step for member in rest for step in series[member]})
            means = [np.mean([series[member][step] for member in rest if step in series[member]]) for step in steps]
            lines.append((f"mean of {len(rest)} others", steps, means))
        entries = []
        for j, (label, x, y) in enumerate(lines):
            color, line = (f"C{j}", STYLES[j % 3]) if j < len(shown) else ("0.5", ":")
            entries += axes.plot(x, y, color=color, linestyle=line, drawstyle="steps-post", label=label)
        _step_axis(axes, runs)
        axes.set_ylim(-0.05, 1.05)
        title(axes, name, entries)
        return
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        run_means = run.family_means(family)
        heights = [run_means.get(member, np.nan) for member in shown]
        if rest:
            heights.append(float(np.mean([run_means[member] for member in rest if member in run_means] or [np.nan])))
        axes.bar(np.arange(len(heights)) + (i - (len(runs) - 1) / 2) * width, heights, width, color=f"C{i}")
    labels = [*map(_short, shown), *([f"{len(rest)} others"] if rest else [])]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylim(0, 1.05)
    title(axes, f"{name}, mean over selections", [])


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:7]}…{name[-6:]}"


def _draw_time(axes: Axes, runs: Sequence[RunScalars], names: Sequence[str]) -> None:
    """Draw one bar per run: the ledger's accounts at its last logged step, then the remaining wall time."""
    logged = {tag for run in runs for tag in run.scalars.keys() | run.decided.keys()}
    others = sorted(tag for tag in logged - {*ACCOUNTS, WALL} if tag.startswith("ledger/") and tag.endswith("_seconds"))
    tags = [*(tag for tag in ACCOUNTS if tag in logged), *others]
    colors = dict(zip((*ACCOUNTS, *others), [*LIGHT_COLORS, *LIGHT_COLORS[-1:] * len(others)], strict=False))
    labels = {tag: tag.removeprefix("ledger/").removesuffix("_seconds") for tag in tags}
    for i, run in enumerate(runs):
        wall = next(iter(run.series(WALL)[1][-1:].tolist()), 0.0)
        left = 0.0
        for tag in tags if wall else []:
            spent = next(iter(run.series(tag)[1][-1:].tolist()), 0.0)
            axes.barh(i, spent, left=left, color=colors[tag], height=0.45)
            left += spent
            if len(runs) == 1:
                labels[tag] += f" {100 * spent / wall:.1f}%"
        axes.barh(i, max(0.0, wall - left), left=left, color=REST_COLOR, height=0.45)
        text = f"{wall:,.0f} s" if wall else "not logged"
        text = f"{names[i]}: {text}" if len(runs) > 1 else f"{text} in all"
        axes.text(0, i - 0.27, text, va="bottom", fontsize=11, color="black" if len(runs) == 1 else f"C{i}")
    axes.set_ylim(max(len(runs) - 0.5, 1.0), -0.75)
    axes.margins(x=0.02)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    x_axis(axes, "seconds")
    axes.grid(visible=False, axis="y")
    rest = Patch(color=REST_COLOR, label="unaccounted")
    title(axes, TIME, [*(Patch(color=colors[tag], label=labels[tag]) for tag in tags), rest])
