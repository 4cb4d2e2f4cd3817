"""The panels that are maps: one row per member of a family of tags, one column per span of steps, values as shades."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from titan_attent.report.runs import RunScalars
from titan_attent.report.style import title, x_axis
from titan_attent.systems.system import Panel

MAX_LABELS = 14


def members_of(run: RunScalars, family: str) -> list[str]:
    """The rest of the run's tags that begin with ``family``, in model order: embedding, layers by number, output."""

    def model_order(name: str) -> tuple[int, int, str]:
        number = re.search(r"\d+", name)
        return (1, int(number[0]), name) if number else (0 if "embed" in name else 2, 0, name)

    return sorted((tag.removeprefix(family) for tag in run.scalars if tag.startswith(family)), key=model_order)


def draw_map(axes: Axes, panel: Panel, runs: Sequence[RunScalars], names: Sequence[str]) -> None:
    """Draw the last run that logged the family. A logged value holds until the next one."""
    family = str(panel.family)
    index = max(i for i, run in enumerate(runs) if members_of(run, family))
    run, members = runs[index], members_of(runs[index], family)
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
    every = -(-len(members) // MAX_LABELS)
    axes.set_yticks(np.arange(0, len(members), every) + 0.5, members[::every], fontsize=9)
    x_axis(axes, "step")
    axes.grid(visible=False)
    axes.set_xlim(0, edges[-1])
    title(axes, panel.title if len(runs) == 1 else f"{panel.title}: {names[index]}", [])
