"""The panels that are maps: a row a member of a family of tags, a column a stretch of steps, the value as a shade."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from titan_attent.report.runs import RunScalars
from titan_attent.report.style import title, x_axis
from titan_attent.systems.system import Panel

MOST_LABELS = 14


def members_of(run: RunScalars, family: str) -> list[str]:
    """What follows ``family`` in the run's tags, in the order of a model: embedding, layers by number, output."""

    def place(name: str) -> tuple[int, int, str]:
        number = re.search(r"\d+", name)
        return (1, int(number[0]), name) if number else (0 if "embed" in name else 2, 0, name)

    return sorted((tag.removeprefix(family) for tag in run.scalars if tag.startswith(family)), key=place)


def draw_map(axes: Axes, panel: Panel, runs: Sequence[RunScalars], names: Sequence[str]) -> None:
    """Of the last run that has logged the family: what was logged holds until the next time."""
    family = str(panel.family)
    place = max(i for i, run in enumerate(runs) if members_of(run, family))
    run, members = runs[place], members_of(runs[place], family)
    steps = sorted({step for member in members for step in run.scalars[family + member]})
    values = np.full((len(members), len(steps)), np.nan)
    for row, member in enumerate(members):
        for step, value in run.scalars[family + member].items():
            values[row, steps.index(step)] = value
    edges = np.array([*steps, max(run.last_step, steps[-1] + 1)], dtype=float)
    finite = values[np.isfinite(values)]
    top = 1.0 if finite.size and finite.max() <= 1 else float(np.quantile(finite, 0.98)) if finite.size else 1.0
    mesh = axes.pcolormesh(edges, np.arange(len(members) + 1), values, cmap="cividis", vmin=0.0, vmax=top)
    axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    every = -(-len(members) // MOST_LABELS)
    axes.set_yticks(np.arange(0, len(members), every) + 0.5, members[::every], fontsize=9)
    x_axis(axes, "step")
    axes.grid(visible=False)
    axes.set_xlim(0, edges[-1])
    title(axes, panel.title if len(runs) == 1 else f"{panel.title}: {names[place]}", [])
