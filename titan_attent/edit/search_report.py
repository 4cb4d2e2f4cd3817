"""The table and the picture of a search."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from titan_attent.edit.expression import Expression
from titan_attent.edit.search_result import BASE, RANDOM, VECTOR, Found, Trial

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def table(found: Found, expression: Expression) -> list[str]:
    """The lines of a Markdown table: every point, its losses, those of random vectors, and the best marked."""
    names = [f"x {number}" for number in range(1, len(expression.vectors) + 1)]
    lines = [
        f"{expression}; control at most {found.limit:.4f}",
        "",
        f"| {' | '.join(names)} | target | control | within the budget | target, random | control, random |",
        "|---" * (len(names) + 5) + "|",
    ]
    random = {trial.factors: trial for trial in found.trials if trial.arm == RANDOM}
    best = found.best(VECTOR)
    for trial in (found.base, *(trial for trial in found.trials if trial.arm == VECTOR)):
        other = random.get(trial.factors, found.base)
        mark = "best" if trial == best else "yes" if found.allowed(trial) else "no"
        factors = " | ".join(f"{factor:g}" for factor in trial.factors)
        losses = f"{trial.target:.4f} | {trial.control:.4f} | {mark} | {other.target:.4f} | {other.control:.4f}"
        lines.append(f"| {factors} | {losses} |")
    return lines


def draw(found: Found, expression: Expression, path: Path) -> None:
    """Heat maps of both losses of both arms, minus the base's; points beyond the budget are crossed out."""
    factors = [found.base.factors, *(trial.factors for trial in found.trials)]
    grids = [sorted(set(of_vector)) for of_vector in zip(*factors, strict=True)]
    columns, rows = grids[0], grids[1] if len(grids) > 1 else [0.0]
    figure, grid = pyplot.subplots(2, 2, figsize=(3 + 1.6 * len(columns), 3 + 1.1 * len(rows)), squeeze=False)
    for row, arm in enumerate((VECTOR, RANDOM)):
        for column, loss in enumerate(("target", "control")):
            points = {trial.factors: trial for trial in (found.base, *found.trials) if trial.arm in (arm, BASE)}
            axes = grid[row][column]
            _draw_map(axes, found, points, columns, rows, loss)
            axes.set_title(f"{loss}, {'vectors' if arm == VECTOR else 'random vectors of equal norm'}")
            axes.set_xlabel(f"factor of {Path(expression.vectors[0].checkpoint).name}")
            if len(grids) > 1:
                axes.set_ylabel(f"factor of {Path(expression.vectors[1].checkpoint).name}")
    figure.suptitle(f"change of the loss in nats; x: control beyond {found.limit:.3f}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_map(
    axes: Any, found: Found, points: dict[tuple[float, ...], Trial], columns: list[float], rows: list[float], loss: str
) -> None:
    def at(x: float, y: float) -> Trial:
        return points[(x, y) if len(found.base.factors) > 1 else (x,)]

    base = getattr(found.base, loss)
    values = np.array([[getattr(at(x, y), loss) - base for x in columns] for y in rows])
    limit = max(float(np.abs(values).max()), 1e-6)
    axes.imshow(values, origin="lower", cmap="coolwarm", vmin=-limit, vmax=limit, aspect="auto")
    for j, y in enumerate(rows):
        for i, x in enumerate(columns):
            crossed = "" if found.allowed(at(x, y)) else "\nx"
            axes.text(i, j, f"{values[j, i]:+.3f}{crossed}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
    axes.set_yticks(range(len(rows)), [f"{y:g}" for y in rows] if len(rows) > 1 else [""])
