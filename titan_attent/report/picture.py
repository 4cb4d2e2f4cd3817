"""The picture: losses and accuracies, then what the teacher chose and what it cost, as far as a run logged them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from titan_attent.report import style
from titan_attent.report.losses import draw_losses, rows_of
from titan_attent.report.runs import RunScalars
from titan_attent.report.teaching import draw_panel, panels_of

MAX_NAME_LENGTH = 64
"""Characters of a run's name in a legend; a title has room for twice as many."""


def draw(runs: Sequence[RunScalars], path: str | os.PathLike[str]) -> None:
    """Write the panels as a PNG, whole or not at all; OSError if it cannot be written."""
    names, panels, num_losses = run_names(runs), panels_of(runs), len(rows_of(runs))
    rows = num_losses - (-len(panels) // 3)
    with matplotlib.rc_context(style.settings(len(runs))):
        figure = Figure(figsize=(17, 4.3 * rows + 0.6), dpi=110, layout="constrained")
        cells = [figure.add_subplot(rows, 3, 1 + i) for i in range(3 * num_losses + len(panels))]
        draw_losses([cells[3 * row : 3 * row + 3] for row in range(num_losses)], runs)
        for axes, panel in zip(cells[3 * num_losses :], panels, strict=True):
            draw_panel(axes, panel, runs, names)
        if len(runs) == 1:
            figure.suptitle(names[0], fontsize=16)
        else:  # the title is the legend
            lines = [Line2D([], [], color=f"C{i}", linewidth=3, label=name) for i, name in enumerate(names)]
            columns = max(1, 130 // (8 + max(map(len, names))))
            figure.legend(handles=lines, loc="outside upper center", ncols=columns, fontsize=14)
        write_whole(path, lambda file: figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.2))


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary file, which then replaces ``path``; if it fails, ``path`` stays as it was."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run_names(runs: Sequence[RunScalars]) -> list[str]:
    """The name under which each run is drawn: the path of a single run, or the part in which several paths differ.

    Only the end of a long name is kept. ``$`` and a leading ``_`` are escaped: matplotlib reads ``$`` as mathematics,
    and leaves labels that begin with ``_`` out of a legend.
    """
    names = [str(runs[0].path)] if len(runs) == 1 else _distinct_parts(runs)
    longest = 2 * MAX_NAME_LENGTH if len(runs) == 1 else MAX_NAME_LENGTH
    ends = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
    names = ends if len(set(ends)) == len(set(names)) else names
    drawn = (name.encode(errors="backslashreplace").decode().replace("$", r"\$") for name in names)
    return [f" {name}" if name.startswith("_") else name for name in drawn]


def _distinct_parts(runs: Sequence[RunScalars]) -> list[str]:
    parts = [Path(os.path.abspath(run.path)).parts for run in runs]
    while len(set(parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    depth = next(n for n in range(1, 1000) if len({part[-n:] for part in parts}) == len(set(parts)))
    return ["/".join(part[-depth:]) for part in parts]
