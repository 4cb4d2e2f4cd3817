"""The scalars of a run: its TensorBoard events and the decisions of its teacher. reading.py reads them.

An event file is one session of the run. A session replaces the values that earlier sessions logged from its first step
on, since those steps were trained again. (TensorBoard's EventAccumulator drops them only where the writer asked for it,
and does not keep the sessions.)

``teacher/rounds.jsonl`` has every pass at its first step; TensorBoard has a pass only if a log step falls into it. If
both have a tag, their values are merged; without the file, TensorBoard alone is used.

Seconds are wall time from the first to the last event of a session, summed over the sessions. Pauses do not count, nor
does the time before a session's first event (start, compilation, steps up to the first logged one). Work that a run
repeated after a kill counts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event

from titan_attent.data.run_record import RunRecord
from titan_attent.foundations.event_files import begins_session
from titan_attent.systems.system_list import renamed

TRAIN, VALIDATION, SPEED = "loss_metrics/global_avg_loss", "validation_metrics/loss", "throughput(tps)"
# For runs on images; the first two only where images are classified.
ACCURACY, TOP5, IMAGE_SPEED = "validation_metrics/accuracy", "validation_metrics/accuracy_top5", "throughput(ips)"
# For data with answers ([data] exact_match); a tag per data source begins with the first and a slash.
EXACT, TOKEN_ACCURACY = "validation_metrics/exact_match", "validation_metrics/token_accuracy"
# For inputs with several random seeds ([data] group_size): tag -> its row of the table.
VOTE = "validation_metrics/exact_match_vote"
MATCHES_OF_INPUTS = {
    VOTE: "exact match of the vote",
    "validation_metrics/input_match_p95": "right seeds of an input, worst 5%",
    "validation_metrics/input_match_worst": "right seeds of an input, worst",
}
LOSSES_OF_INPUTS = {
    "validation_metrics/input_loss_p95": "loss of an input, 95th percentile",
    "validation_metrics/input_loss_worst": "loss of an input, worst",
}
# Of text; with several validation sets, the tags of each begin with this, or with VALIDATION, and a slash.
BITS = "validation_metrics/bits_per_byte"
SPEEDS = (SPEED, IMAGE_SPEED)
TOKENS, TRAINED, COVERED = "n_tokens_seen", "ledger/examples_trained", "ledger/examples_covered"
SCORED = "ledger/examples_scored"
WALL, COVERED_RATE = "ledger/wall_seconds", "ledger/tokens_covered_per_second"

Scalars = dict[str, dict[int, float]]  # [tag][step]
Axis = Literal["step", "tokens", "seconds"]


@dataclass
class RunScalars:
    """The scalars of one run: ``scalars[tag][step]`` from TensorBoard, steps ascending."""

    path: Path
    scalars: Scalars = field(default_factory=dict)
    seconds: Scalars = field(default_factory=dict)  # when each value was logged, in seconds of the run
    decided: Scalars = field(default_factory=dict)  # from rounds.jsonl, at the first step of each pass
    session_starts: list[int] = field(default_factory=list)  # the first logged step of each session
    session_seconds: list[float] = field(default_factory=list)  # seconds of the run at which each session starts
    wall_seconds: float = 0.0  # first to last event of each session, summed: pauses do not count
    hosts: set[str] = field(default_factory=set)  # the hosts of the sessions
    record: RunRecord = field(default_factory=RunRecord)
    notes: list[str] = field(default_factory=list)  # files and lines that could not be read

    @property
    def is_of_images(self) -> bool:
        return IMAGE_SPEED in self.scalars

    @property
    def loss_unit(self) -> str | None:
        """The unit of the losses; None for a run on images without a validation, whose learner is not known before."""
        if not self.is_of_images and ACCURACY not in self.scalars:
            return "nats per token"
        if ACCURACY in self.scalars:
            return "nats per image"
        return "mean squared error" if VALIDATION in self.scalars else None

    @property
    def last_step(self) -> int:
        return max(max(values) for values in self.scalars.values())

    def series(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 [n], values float64 [n]); without a session's first throughput, which includes compilation."""
        items = sorted({**self.decided.get(tag, {}), **self.scalars.get(tag, {})}.items())
        kept = [(step, value) for step, value in items if tag not in SPEEDS or step not in self.session_starts]
        return np.array([step for step, _ in kept], np.int64), np.array([value for _, value in kept], np.float64)

    def along(self, axis: Axis, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """(x float64 [n], values float64 [n]) of a TensorBoard tag; both empty where the axis is unknown tokens."""
        steps, values = self.series(tag)
        if axis == "seconds":
            return np.array([self.seconds[tag][step] for step in steps.tolist()]), values
        factor = self.tokens_per_step if axis == "tokens" else 1.0
        return (steps * factor, values) if factor else (np.zeros(0), np.zeros(0))

    def starts(self, axis: Axis) -> list[float]:
        """Where the sessions start along an axis; empty where the axis is unknown tokens."""
        if axis == "seconds":
            return self.session_seconds
        factor = self.tokens_per_step if axis == "tokens" else 1.0
        return [step * factor for step in self.session_starts] if factor else []

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens per global batch over all ranks, from the run's record, or else from its scalars; None if unknown.

        ``n_tokens_seen`` is summed over the ranks, so it does not depend on their number. Its first logged value is
        used: it precedes any resume, after which torchtitan alone miscounts on another number of ranks. Under context
        parallelism it counts every token once per rank of the ``cp`` mesh (torchtitan #2990). The ledger counts each
        example once. So where both are logged, a whole multiple of the ledger's count is corrected to that count.
        """
        recorded = (self.record.batch_size or 0) * (self.record.tokens_per_example or 0)
        if recorded > 0:
            return float(recorded)
        step, seen = next(iter(self.scalars.get(TOKENS, {}).items()), (0, 0.0))
        logged, counted = seen / step if step else None, self._ledger_tokens_per_step()
        if logged is None or counted is None:
            return logged or counted
        multiple = round(logged / counted)
        return counted if multiple > 1 and abs(logged / counted - multiple) < 1e-3 else logged

    def _ledger_tokens_per_step(self) -> float | None:
        """Batch size x tokens per example (token rate x seconds / examples); None unless both are whole numbers."""
        # From TensorBoard alone: a round is recorded before its first batch is counted.
        counts, rate, wall, covered = (self.scalars.get(tag, {}) for tag in (TRAINED, COVERED_RATE, WALL, COVERED))
        if len(counts) < 2 or not counts.keys() == rate.keys() == wall.keys() == covered.keys():
            return None
        first, last = next(iter(counts)), next(reversed(counts))
        if not covered[last] > 0:
            return None
        batch, example = (counts[last] - counts[first]) / (last - first), rate[last] * wall[last] / covered[last]
        if not (math.isfinite(batch * example) and round(batch) > 0 and round(example) > 0):
            return None
        whole = abs(batch - round(batch)) < 1e-3 * batch and abs(example - round(example)) < 1e-3 * example
        return float(round(batch) * round(example)) if whole else None

    def family_means(self, family: str) -> dict[str, float]:
        """Mean over the decisions of each tag that begins with ``family``: tag without that prefix -> mean."""
        tags = sorted(tag for tag in self.scalars.keys() | self.decided.keys() if tag.startswith(family))
        logged = {tag: (self.decided.get(tag) or self.scalars[tag]).values() for tag in tags}
        finite = {tag: [value for value in values if math.isfinite(value)] for tag, values in logged.items()}
        return {tag.removeprefix(family): sum(values) / len(values) for tag, values in finite.items() if values}

    def add_session(self, events: Iterable[Event], *, host: str) -> None:
        """Add the events of a session; they replace earlier values from its first step on."""
        start: int | None = None
        added: dict[str, dict[int, tuple[float, float]]] = {}  # value, clock
        by_tag: dict[str, dict[int, tuple[float, float]]] = {}  # the same, by the tag in the file
        clocks = []
        for event in events:
            if start is None and begins_session(event):
                start = event.step
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    if (points := by_tag.get(value.tag)) is None:
                        tag = renamed(value.tag, separator="/")  # tags of earlier versions have new names
                        points = by_tag[value.tag] = added.setdefault(tag, {})
                    clock = event.wall_time
                    points[event.step] = (value.simple_value, clock)
                    clocks.append(clock)
        if start is None:
            return
        self.scalars, self.seconds = _before(start, self.scalars), _before(start, self.seconds)
        if not self.scalars:  # not a resume: another run had used this folder
            self.session_starts, self.session_seconds, self.wall_seconds, self.hosts = [], [], 0.0, set()
        if clocks:
            begin = min(clocks)
            self.hosts.add(host)
            self.session_starts.append(start)
            self.session_seconds.append(self.wall_seconds)
            for tag, points in added.items():
                self.scalars.setdefault(tag, {}).update({step: value for step, (value, _) in points.items()})
                elapsed = {step: self.wall_seconds + clock - begin for step, (_, clock) in points.items()}
                self.seconds.setdefault(tag, {}).update(elapsed)
            self.wall_seconds += max(clocks) - begin


def _before(start: int, scalars: Scalars) -> Scalars:
    kept = {tag: {step: x for step, x in values.items() if step < start} for tag, values in scalars.items()}
    return {tag: values for tag, values in kept.items() if values}
