"""The panels on teaching and speed. One run: a color a tag. Several: a color a run, a dash pattern a tag."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from titan_attent.report.runs import INCLUSION, SPEED, WALL, RunScalars
from titan_attent.report.style import LIGHT_COLORS, REST_COLOR, mark_resumes, smoothed, title, x_axis
from titan_attent.report.summary import ACCOUNTS, shown_sources

RATIO, ROUND, OVERHEAD, ESS = (
    "teacher/ratio",
    "teacher/round",
    "ledger/overhead_percent",
    "teacher/effective_sample_size",
)
SKIPPED, BREAK_EVEN, QUARANTINED = "ledger/skipped_share", "ledger/break_even_share", "teacher/quarantined"
SOURCES, TIME = "chosen of each data source, share", "where the time went"
PANELS: dict[str, tuple[str, ...]] = {
    "share of the pool in a pass, and round": (RATIO, ROUND),
    "importance": ("teacher/importance_mean", "teacher/importance_p99"),
    "selection, shares": (ESS, "teacher/never_selected", "teacher/overlap"),
    SOURCES: (),
    "examples skipped, and needed for teaching to pay": (SKIPPED, BREAK_EVEN),
    "guards": (QUARANTINED, "teacher/nonfinite", "teacher/fallback"),
    TIME: (),
    "tokens/s/device, smoothed": (SPEED,),
    "overhead of teaching, % of wall time": (OVERHEAD,),
}
UNIT_RANGE, FROM_ZERO = (RATIO, ESS), (SPEED, OVERHEAD, SKIPPED, QUARANTINED)
LABELS = {RATIO: "share", ROUND: "round (right axis)", BREAK_EVEN: "share to break even"}
STYLES: tuple[Any, ...] = ("-", "--", "-.")


def panels_of(runs: Sequence[RunScalars]) -> list[str]:
    """The titles of :data:`PANELS` for which a run has something to draw."""

    def shows(name: str, tags: Sequence[str]) -> bool:
        if name == SOURCES:
            return bool(shown_sources(runs)[0])
        if name == TIME:
            return any(len(run.series(WALL)[0]) for run in runs)
        values = np.concatenate([run.series(tag)[1] for run in runs for tag in tags])
        # That no guard ever struck is said by the table.
        return bool(np.any(np.isfinite(values) & ((values != 0) if QUARANTINED in tags else True)))

    return [name for name, tags in PANELS.items() if shows(name, tags)]


def draw_panel(axes: Axes, name: str, runs: Sequence[RunScalars], names: Sequence[str]) -> None:
    """``names``: of the runs."""
    if name == SOURCES:
        _draw_sources(axes, runs)
    elif name == TIME:
        _draw_time(axes, runs, names)
    else:
        _draw_tags(axes, name, runs)


def _draw_tags(axes: Axes, name: str, runs: Sequence[RunScalars]) -> None:
    """Tags against steps; the rounds on an axis of their own."""
    tags, twin, entries = PANELS[name], axes, []
    for j, tag in enumerate(tags):
        drawn = [(i, *run.series(tag)) for i, run in enumerate(runs) if len(run.series(tag)[0])]
        if tag == ROUND and drawn:
            twin = axes.twinx()
            twin.spines["right"].set_visible(True)
            twin.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        for i, steps, values in drawn:
            color, finite = f"C{j if len(runs) == 1 else i}", np.isfinite(values)
            steps, values = steps[finite], values[finite]
            if tag == SPEED:
                axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
                values = smoothed(values)
            drawstyle, marker = "steps-post" if tag.startswith("teacher/") else "default", "o" if len(steps) < 3 else ""
            target = twin if tag == ROUND else axes
            target.plot(steps, values, color=color, linestyle=STYLES[j], marker=marker, ms=4, drawstyle=drawstyle)
        if drawn and len(tags) > 1:
            color, label = f"C{j}" if len(runs) == 1 else "0.25", tag.split("/")[-1].replace("_", " ")
            entries.append(Line2D([], [], color=color, linestyle=STYLES[j], label=LABELS.get(tag, label)))
    _step_axis(axes, runs)
    title(axes, name, entries)
    if tags[0] in UNIT_RANGE:
        axes.set_ylim(-0.05, 1.05)
    elif tags[0] in FROM_ZERO:
        values = np.concatenate([run.series(tag)[1] for run in runs for tag in tags])
        axes.set_ylim(0, 1.08 * max(values[np.isfinite(values)]) or 1)
    if tags[0] == QUARANTINED:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _step_axis(axes: Axes, runs: Sequence[RunScalars]) -> None:
    x_axis(axes, "step (dotted: resumed)" if any(len(run.session_starts) > 1 for run in runs) else "step")
    mark_resumes(axes, runs, "step")
    last = max(run.last_step for run in runs)
    axes.set_xlim(-0.03 * last, 1.03 * last)


def _draw_sources(axes: Axes, runs: Sequence[RunScalars]) -> None:
    """One run: a line a source against steps. Several: a bar a run and source, the mean over the selections."""
    shown, rest = shown_sources(runs)
    if len(runs) == 1:
        series = {source: dict(zip(*runs[0].series(INCLUSION + source), strict=True)) for source in (*shown, *rest)}
        lines = [(_short(source), list(series[source]), list(series[source].values())) for source in shown]
        if rest:
            steps = sorted({step for source in rest for step in series[source]})
            means = [np.mean([series[source][step] for source in rest if step in series[source]]) for step in steps]
            lines.append((f"mean of {len(rest)} others", steps, means))
        entries = []
        for j, (label, x, y) in enumerate(lines):
            color, line = (f"C{j}", STYLES[j % 3]) if j < len(shown) else ("0.5", ":")
            entries += axes.plot(x, y, color=color, linestyle=line, drawstyle="steps-post", label=label)
        _step_axis(axes, runs)
        axes.set_ylim(-0.05, 1.05)
        title(axes, SOURCES, entries)
        return
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        shares = run.mean_inclusion()
        heights = [shares.get(source, np.nan) for source in shown]
        if rest:
            heights.append(float(np.mean([shares[source] for source in rest if source in shares] or [np.nan])))
        axes.bar(np.arange(len(heights)) + (i - (len(runs) - 1) / 2) * width, heights, width, color=f"C{i}")
    labels = [*map(_short, shown), *([f"{len(rest)} others"] if rest else [])]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylim(0, 1.05)
    title(axes, f"{SOURCES}, mean over selections", [])


def _short(source: str) -> str:
    return source if len(source) <= 14 else f"{source[:7]}…{source[-6:]}"


def _draw_time(axes: Axes, runs: Sequence[RunScalars], names: Sequence[str]) -> None:
    """A bar a run, up to its last logged moment: the ledger's accounts, and the rest of its wall time."""
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
