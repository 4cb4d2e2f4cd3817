"""The scalars of a run: its TensorBoard events, and the decisions of its teacher. reading.py reads them.

An event file is one session of the run. A session hides what earlier sessions logged from its first step on, as these
steps were trained again. (TensorBoard's EventAccumulator hides them only where the writer asked for it, and forgets the
sessions.)

``teacher/rounds.jsonl`` has every pass at its first step; TensorBoard sees a pass only if a log step falls into it.
Where both have a tag they are put together, and without the file TensorBoard is all there is.

Seconds are wall time from the first to the last event of a session, added up over the sessions: pauses do not count,
nor does what a session does before its first event (start, compilation, steps up to the first logged one). Work that a
kill made the run repeat counts: it was paid for.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from titan_attent.data.run_record import RunRecord
from titan_attent.systems.system_list import renamed

TRAIN, VALIDATION, SPEED = "loss_metrics/global_avg_loss", "validation_metrics/loss", "throughput(tps)"
# Of runs of images; the first two only where images are classified.
ACCURACY, TOP5, IMAGE_SPEED = "validation_metrics/accuracy", "validation_metrics/accuracy_top5", "throughput(ips)"
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
    seconds: Scalars = field(default_factory=dict)  # when each of them was logged, in seconds of the run
    decided: Scalars = field(default_factory=dict)  # from rounds.jsonl, at the first step of each pass
    session_starts: list[int] = field(default_factory=list)  # first logged steps
    session_seconds: list[float] = field(default_factory=list)  # of the run, when those sessions start
    wall_seconds: float = 0.0  # first to last event of each session, added up: pauses do not count
    hosts: set[str] = field(default_factory=set)  # on which the sessions ran
    record: RunRecord = field(default_factory=RunRecord)
    notes: list[str] = field(default_factory=list)  # what of its files could not be read

    @property
    def is_of_images(self) -> bool:
        return IMAGE_SPEED in self.scalars

    @property
    def loss_unit(self) -> str | None:
        """Of the losses; None for a run of images that has not validated: what it learns shows there."""
        if not self.is_of_images and ACCURACY not in self.scalars:
            return "nats per token"
        if ACCURACY in self.scalars:
            return "nats per image"
        return "mean squared error" if VALIDATION in self.scalars else None

    @property
    def last_step(self) -> int:
        return max(max(values) for values in self.scalars.values())

    def series(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 [n], values float64 [n]); without the first throughput of a session, which times compilation."""
        items = sorted({**self.decided.get(tag, {}), **self.scalars.get(tag, {})}.items())
        kept = [(step, value) for step, value in items if tag not in SPEEDS or step not in self.session_starts]
        return np.array([step for step, _ in kept], np.int64), np.array([value for _, value in kept], np.float64)

    def along(self, axis: Axis, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """(x float64 [n], values float64 [n]) of a TensorBoard tag; both empty if the run does not tell its tokens."""
        steps, values = self.series(tag)
        if axis == "seconds":
            return np.array([self.seconds[tag][step] for step in steps.tolist()]), values
        factor = self.tokens_per_step if axis == "tokens" else 1.0
        return (steps * factor, values) if factor else (np.zeros(0), np.zeros(0))

    def starts(self, axis: Axis) -> list[float]:
        """Where the sessions start; none if the run does not tell its tokens."""
        if axis == "seconds":
            return self.session_seconds
        factor = self.tokens_per_step if axis == "tokens" else 1.0
        return [step * factor for step in self.session_starts] if factor else []

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of a global batch over all ranks, as the run told or else logged them; None where nothing tells.

        ``n_tokens_seen`` is the sum over the ranks, so any number of them gives the same; its first logged value comes
        before any resume, which in torchtitan alone goes wrong on another number of ranks. Under context parallelism
        it counts every token once a rank of the ``cp`` mesh (torchtitan #2990). The ledger counts examples, on no rank
        more than once, so where both are there a whole multiple of the ledger's count is corrected to it.
        """
        told = (self.record.batch_size or 0) * (self.record.tokens_per_example or 0)
        if told > 0:
            return float(told)
        step, seen = next(iter(self.scalars.get(TOKENS, {}).items()), (0, 0.0))
        logged, counted = seen / step if step else None, self._ledger_tokens_per_step()
        if logged is None or counted is None:
            return logged or counted
        multiple = round(logged / counted)
        return counted if multiple > 1 and abs(logged / counted - multiple) < 1e-3 else logged

    def _ledger_tokens_per_step(self) -> float | None:
        """Batch size x tokens of an example, whole numbers both: the rate times its seconds, over its examples."""
        # TensorBoard alone: what a round records is a moment before its first batch is counted.
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
        """The mean over the decisions of each tag that begins with ``family``: the rest of the tag -> the mean."""
        tags = sorted(tag for tag in self.scalars.keys() | self.decided.keys() if tag.startswith(family))
        logged = {tag: (self.decided.get(tag) or self.scalars[tag]).values() for tag in tags}
        finite = {tag: [value for value in values if math.isfinite(value)] for tag, values in logged.items()}
        return {tag.removeprefix(family): sum(values) / len(values) for tag, values in finite.items() if values}

    def add_session(self, events: Iterable[Event], *, host: str) -> None:
        start: int | None = None
        added: dict[str, dict[int, tuple[float, float]]] = {}  # value, clock
        clocks = []
        for event in events:
            if start is None and (event.summary.value or event.session_log.status == SessionLog.START):
                start = event.step
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    tag = renamed(value.tag, separator="/")  # of an earlier version
                    added.setdefault(tag, {})[event.step] = (value.simple_value, event.wall_time)
                    clocks.append(event.wall_time)
        if start is None:
            return
        self.scalars, self.seconds = _before(start, self.scalars), _before(start, self.seconds)
        if not self.scalars:  # no resume: another run had used this folder
            self.session_starts, self.session_seconds, self.wall_seconds, self.hosts = [], [], 0.0, set()
        if clocks:
            self.hosts.add(host)
            self.session_starts.append(start)
            self.session_seconds.append(self.wall_seconds)
            for tag, points in added.items():
                self.scalars.setdefault(tag, {}).update({step: value for step, (value, _) in points.items()})
                elapsed = {step: self.wall_seconds + clock - min(clocks) for step, (_, clock) in points.items()}
                self.seconds.setdefault(tag, {}).update(elapsed)
            self.wall_seconds += max(clocks) - min(clocks)


def _before(start: int, scalars: Scalars) -> Scalars:
    kept = {tag: {step: x for step, x in values.items() if step < start} for tag, values in scalars.items()}
    return {tag: values for tag, values in kept.items() if values}
