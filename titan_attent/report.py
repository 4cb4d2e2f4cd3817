"""The report: what a run learned, what its teacher chose, what that cost, where its files are. A table and a picture.

    python -m titan_attent.report outputs/soft                                    # writes outputs/soft/curves.png
    python -m titan_attent.report outputs/soft outputs/uniform --output both.png  # side by side, overlaid

A run is a ``job.dump_folder``; read are the TensorBoard events below its ``tb/``, in the order they were written, with
``metrics.save_for_all_ranks`` those of the lowest rank. An event file is one session of the run. A session hides what
earlier ones logged from its own first step on: these steps were trained again. (TensorBoard's EventAccumulator hides
them only where the writer asked for it, and forgets the sessions.)

Cost: one pass over the events, 50,000 a second; the picture takes a second or two. A live run can be reported too.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

TRAIN, VALIDATION, SPEED = "loss_metrics/global_avg_loss", "validation_metrics/loss", "throughput(tps)"
RATIO, ROUND, OVERHEAD = "teacher/ratio", "teacher/round", "ledger/overhead_percent"
CHOSEN = "round ratio selected importance_mean importance_p99 effective_sample_size never_selected overlap max_weight"
COST = "select_seconds exchange_seconds overhead_percent examples_trained examples_covered tokens_covered_per_second"
# In the table with or without a value; further teacher/* and ledger/* tags come after them.
TEACHING = (*(f"teacher/{name}" for name in CHOSEN.split()), *(f"ledger/{name}" for name in COST.split()))
PANELS = {
    "loss, nats a token": (TRAIN, VALIDATION),
    "share of the data in a pass, and round": (RATIO, ROUND),
    "importance": ("teacher/importance_mean", "teacher/importance_p99"),
    "selection, shares": ("teacher/effective_sample_size", "teacher/never_selected", "teacher/overlap"),
    "tokens/s/device": (SPEED,),
    "overhead of teaching, % of wall time": (OVERHEAD,),
}
LABELS = {TRAIN: "train, smoothed", VALIDATION: "validation", SPEED: "smoothed", ROUND: "round (right axis)"}
STYLES = ("-", "--", "-.")


@dataclass
class RunScalars:
    """The scalars of one run: ``scalars[tag][step]``, steps ascending."""

    path: Path
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    session_starts: list[int] = field(default_factory=list)  # first logged steps
    wall_seconds: float = 0.0  # first to last event of each session, added up: pauses do not count

    @property
    def last_step(self) -> int:
        return max(max(values) for values in self.scalars.values())

    def series(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 [n], values float64 [n]); without the first throughput of a session, which times compilation."""
        items = self.scalars.get(tag, {}).items()
        kept = [(step, value) for step, value in items if tag != SPEED or step not in self.session_starts]
        return np.array([step for step, _ in kept], np.int64), np.array([value for _, value in kept], np.float64)

    def add_session(self, event_file: Path) -> None:
        start, times = None, []
        for event in LegacyEventFileLoader(str(event_file)).Load():
            if start is None and (event.summary.value or event.session_log.status == SessionLog.START):
                start = event.step
                kept = {tag: {s: x for s, x in values.items() if s < start} for tag, values in self.scalars.items()}
                self.scalars = {tag: values for tag, values in kept.items() if values}
                if not self.scalars:  # no resume: another run had used this folder
                    self.session_starts, self.wall_seconds = [], 0.0
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    self.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                    times.append(event.wall_time)
        if start is not None and times:
            self.session_starts.append(start)
            self.wall_seconds += max(times) - min(times)


def read_run(path: str | os.PathLike[str]) -> RunScalars:
    """Read the events below ``path/tb``; ValueError if ``path`` is not a folder or has none."""
    run = RunScalars(Path(path))
    if not run.path.is_dir():
        raise ValueError(f"{run.path} is not a folder: name the job.dump_folder of a run")
    tb = run.path / "tb"
    lowest: dict[str, Path] = {}  # stamped folder -> its first rank's folder
    for event_file in sorted(tb.rglob("events.out.tfevents.*")):
        if lowest.setdefault(event_file.relative_to(tb).parts[0], event_file.parent) == event_file.parent:
            run.add_session(event_file)
    if not run.scalars:
        raise ValueError(
            f"{tb} holds no TensorBoard scalars: set metrics.enable_tensorboard = true for the run "
            "(and leave metrics.save_tb_folder at tb), or wait for its first logged step"
        )
    run.scalars = {tag: dict(sorted(values.items())) for tag, values in run.scalars.items()}
    return run


def summarize(run: RunScalars) -> dict[str, str]:
    """The table's column of one run: fact -> text, "-" where the run did not log it; files relative to the run."""

    def last(tag: str, form: str = "") -> str:
        steps, values = run.series(tag)
        if not len(steps):
            return "-"
        form = form or ("{:,.0f}" if abs(values[-1]) >= 1000 else "{:.4g}")
        return form.format(values[-1]) + ("" if steps[-1] == run.last_step else f" at step {steps[-1]:,}")

    validated = [(value, step) for step, value in run.scalars.get(VALIDATION, {}).items() if value == value]  # no nan
    speeds = run.series(SPEED)[1]
    resumes = len(run.session_starts) - 1
    minutes, seconds = divmod(round(run.wall_seconds), 60)
    others = sorted(tag for tag in run.scalars if tag.startswith(("teacher/", "ledger/")) and tag not in TEACHING)
    checkpoints = [file.parent.name for file in run.path.glob("checkpoint/step-*/.metadata")]
    newest = max((name for name in checkpoints if name[5:].isdecimal()), key=lambda name: int(name[5:]), default=None)
    return {
        "run": str(run.path),
        "steps": f"{run.last_step:,}" + (f" ({resumes} resume{'s' * (resumes > 1)})" if resumes else ""),
        "train loss": last(TRAIN, "{:.4f}"),
        "validation loss": last(VALIDATION, "{:.4f}"),
        "best validation loss": "{:.4f} at step {:,}".format(*min(validated)) if validated else "-",
        "tokens/s/device": f"{np.median(speeds):,.0f}" if len(speeds) else "-",
        "wall time": f"{minutes // 60} h {minutes % 60:02} min {seconds:02} s",
        **{tag: last(tag) for tag in (*TEACHING, *others)},
        "checkpoint": f"checkpoint/{newest}" if newest else "-",
        "tensorboard": "tb",
        "trace": "teacher/trace.jsonl" if (run.path / "teacher" / "trace.jsonl").is_file() else "-",
    }


def table(columns: Sequence[dict[str, str]]) -> str:
    """One line a fact, one column a run."""
    facts = list(dict.fromkeys(fact for column in sorted(columns, key=len, reverse=True) for fact in column))
    cells = [facts, *([column.get(fact, "-") for fact in facts] for column in columns)]
    widths = [max(map(len, column)) for column in cells]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*cells, strict=True))


def draw(runs: Sequence[RunScalars], path: str | os.PathLike[str]) -> None:
    """Write ``PANELS`` over the steps as a PNG, whole or not at all. One run: a color a tag; several: a color a run."""
    parts = [Path(os.path.abspath(run.path)).parts for run in runs]
    depth = next(n for n in range(1, 1000) if len({part[-n:] for part in parts}) == len(set(parts)))
    names = ["/".join(part[-depth:]) for part in parts]  # with the parents that tell them apart
    figure = Figure(figsize=(16, 8.5), dpi=110, layout="constrained")
    all_axes = figure.subplots(2, 3, sharex=True).ravel()
    for axes, (title, tags) in zip(all_axes, PANELS.items(), strict=True):
        axes.set_title(title, pad=24)  # the legend stands between
        _draw_panel(axes, runs, tags)
    figure.supxlabel("step (dotted: resumed)" if any(len(run.session_starts) > 1 for run in runs) else "step")
    all_axes[0].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    all_axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(runs) == 1:
        figure.suptitle(names[0], fontsize=15)
    else:  # the title is the legend
        lines = [Line2D([], [], color=f"C{i}", linewidth=3, label=name) for i, name in enumerate(names)]
        columns = max(1, 130 // (8 + max(map(len, names))))
        figure.legend(handles=lines, loc="outside upper center", ncols=columns, fontsize=13, frameon=False)
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.2)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_panel(axes: Axes, runs: Sequence[RunScalars], tags: Sequence[str]) -> None:
    settled = [np.zeros(0)]
    for j, tag in enumerate(tags):
        drawn = [(i, run, *run.series(tag)) for i, run in enumerate(runs) if len(run.series(tag)[0])]
        target = axes.twinx() if tag == ROUND and drawn else axes
        line = "" if tag == VALIDATION else STYLES[j]
        for i, run, steps, values in drawn:
            color, marker = f"C{j if len(runs) == 1 else i}", "o" if not line or len(steps) < 3 else ""
            steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
            settled.append(values[steps >= run.last_step / 20])
            if tag in (TRAIN, SPEED):
                axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
                half = len(values) // 50  # smoothed: means over a 25th of the values, centered but at the end
                values = np.array([values[max(0, n - half) : n + min(half, n) + 1].mean() for n in range(len(values))])
            drawstyle = "steps-post" if tag.startswith("teacher/") else "default"
            target.plot(steps, values, color=color, linestyle=line, marker=marker, markersize=4, drawstyle=drawstyle)
        if drawn:
            color, label = color if len(runs) == 1 else "0.25", LABELS.get(tag, tag.split("/")[-1].replace("_", " "))
            axes.plot([], [], color=color, linestyle=line, marker=marker, label=label)
        if target is not axes:  # rounds
            target.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if axes.lines:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.99), ncols=3, frameon=False)
        axes.grid(alpha=0.25)
        for i, start in ((i, start) for i, run in enumerate(runs) for start in run.session_starts[1:]):
            axes.axvline(start, color="0.5" if len(runs) == 1 else f"C{i}", linestyle=":", linewidth=0.8)
    else:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", fontsize=13, color="0.5")
        axes.set_yticks([])
    shown = np.concatenate(settled)
    if tags[0] == TRAIN and len(shown):  # the first losses would flatten the others
        margin = 0.05 * np.ptp(shown) or 0.1
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    elif tags[0] in (RATIO, "teacher/effective_sample_size"):
        axes.set_ylim(-0.05, 1.05)
    elif tags[0] in (SPEED, OVERHEAD):
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m titan_attent.report", description="A table and a picture of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's job.dump_folder")
    parser.add_argument("--output", metavar="PNG", help="the picture; by default curves.png in the first run's folder")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(path) for path in args.runs]
        picture = Path(args.output or runs[0].path / "curves.png")
        if picture.suffix != ".png" or not os.access(picture.parent, os.W_OK):
            raise ValueError(f"{picture} cannot be written: name a .png file in a writable folder with --output")
    except ValueError as error:
        print(f"titan_attent.report: {error}", file=sys.stderr)
        return 2
    print(table([summarize(run) for run in runs]))
    draw(runs, picture)
    print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
