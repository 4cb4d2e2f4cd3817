"""The picture of the distillation experiment: accuracy against steps and against FLOPs, means over the seeds."""

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.distillation.arms import LABELS, LABELS_LONG, ONE_SHOT, PROGRESSIVE, TWO_SHOT, WRONG_PHASE
from benchmarks.distillation.problems import PROBLEMS
from benchmarks.distillation.table import STUDENTS, Result, curve, flops, of
from titan_attent.report.style import COLORS, settings, x_axis

SHOWN = (
    *(LABELS, ONE_SHOT, TWO_SHOT, f"{TWO_SHOT}, argmax", PROGRESSIVE),
    *(WRONG_PHASE, "after the fall", "softened last"),
)
WIDTH, HEIGHT, DPI = 14.0, 4.6, 100


def draw(results: Sequence[Result]) -> bytes:
    """A PNG with one row per problem."""
    names = [name for name in PROBLEMS if any(result["problem"] == name for result in results)]
    with matplotlib.rc_context(settings(len(COLORS))):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(names)), dpi=DPI, layout="constrained")
        for number, name in enumerate(names):
            left, right = (figure.add_subplot(len(names), 2, 1 + 2 * number + i) for i in (0, 1))
            for color, arm in enumerate(SHOWN):
                _lines(left, right, list(of(results, name, arm).values()), COLORS[color], arm)
            _lines(None, right, list(of(results, name, LABELS_LONG).values()), COLORS[0], "")
            left.set_ylabel("accuracy on held-out rows")
            left.set_title(name, loc="left")
            x_axis(left, "steps of the student")
            x_axis(right, f"FLOPs, in steps of the student alone; 1/{STUDENTS} of the source's training")
            right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=11)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def _lines(left: Axes | None, right: Axes, own: list[Result], color: str, label: str) -> None:
    """The mean over the seeds, up to the end of the shortest run."""
    if not own:
        return
    curves = [curve(result) for result in own]
    steps = sorted(set.intersection(*(set(each) for each in curves)))
    means = np.array([np.mean([each[step] for each in curves]) for step in steps])
    students = math.inf if not own[0]["source_step_flops"] else STUDENTS
    spent = np.array([flops(own[0], step, students=students) / own[0]["step_flops"] for step in steps])
    style = {"color": color, "linewidth": 1.7}
    if left is not None:
        left.plot(steps, means, **style)
    right.plot(spent, means, label=label or None, linestyle="-" if label else ":", **style)
