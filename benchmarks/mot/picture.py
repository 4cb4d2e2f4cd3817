"""The picture of the benchmark: loss against steps, on a log axis, with the bounds of the stages."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.mot.arms import ARMS, DATA
from benchmarks.mot.page import of
from titan_attent.data.io.atomic import write_atomically
from titan_attent.report.style import COLORS, settings

DASHES = ("-", "--", ":")


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one panel per data; a line is the mean of an arm over its seeds, on a log axis."""
    with matplotlib.rc_context(settings(len(COLORS))):
        figure = Figure(figsize=(15, 8), layout="constrained")
        for axes, data in zip(figure.subplots(1, len(DATA)), DATA, strict=True):
            for i, arm in enumerate(ARMS):
                own = of(results, data, arm)
                if own:
                    steps = [look["step"] for look in own[0]["looks"]]
                    losses = np.mean([[look["loss"] for look in one["looks"]] for one in own], axis=0)
                    axes.plot(steps, losses, DASHES[i // len(COLORS)], color=COLORS[i % len(COLORS)], label=arm)
            for third in (1, 2):
                axes.axvline(third * results[0]["steps"] / 3, color="gray", linewidth=0.8)
            axes.set(yscale="log", xlabel="steps", title=f"{data}: mean squared error, mean over seeds")
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small"
        )
        stream = io.BytesIO()
        figure.savefig(stream, dpi=80, format="png")
    write_atomically(path, stream.getvalue())
