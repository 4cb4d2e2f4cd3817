"""What a run had cost at a step: in tokens, in FLOPs with scoring charged, in seconds.

    tokens    those trained: the step x the tokens of a global batch
    FLOPs     of a trained token as torchtitan counts them (tflops / throughput), x the trained tokens, without what
              freezing and the highway saved of them (freezing/, highway/ saved_of_step)
              + a third of them for each token of ledger/examples_scored, as scoring is a forward pass
              + what the scorers whose losses are read took before the run: their own count where the run told it
              (cost.json), else their seconds at this run's pace
    seconds   of the run, and those of its scorers

Validation is charged to nobody. Where a run does not tell its FLOPs a token, its FLOPs are in tokens trained that would
have cost as much: two runs of one model compare by them as well.

Cost: nothing beside reading the scalars.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from titan_attent.report.runs import SCORED, SPEED, TRAINED, RunScalars

SAVED_OF_STEP = ("freezing/saved_of_step", "highway/saved_of_step")
PREPAID, TRAIN_SECONDS = "ledger/prepaid_seconds", "ledger/train_seconds"
TFLOPS = "tflops"


@dataclass
class Costs:
    """Of one run.

    Attributes:
        flops_per_token: of training; None where the run does not tell.
        prepaid_seconds: what its scorers took.
        unknown: why its FLOPs cannot be charged, in words; None if they can.
    """

    run: RunScalars
    flops_per_token: float | None = field(init=False)
    prepaid_seconds: float = field(init=False)
    unknown: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        run = self.run
        self.flops_per_token = _flops_per_token(run)
        self.prepaid_seconds = self._last(PREPAID)
        self._scored = run.series(SCORED)
        self._example: float | None = run.record.tokens_per_example
        batch = run.record.batch_size or _batch_size(run)
        if self._example is None and batch and run.tokens_per_step:
            self._example = run.tokens_per_step / batch
        self._prepaid = self._prepaid_tokens()
        if not run.tokens_per_step:
            self.unknown = f"{run.path} does not tell its tokens"
        elif self._last(SCORED) and self._example is None:
            self.unknown = f"{run.path} does not tell what the {self._last(SCORED):,.0f} examples that it scored cost"
        elif self._prepaid is None:
            self.unknown = f"{run.path} does not tell what its scorers cost"

    @property
    def has_scoring(self) -> bool:
        """Whether anything beside training is charged."""
        return self._last(SCORED) > 0 or bool(self._prepaid)

    def tokens(self, step: float) -> float | None:
        """Trained until ``step``."""
        return step * self.run.tokens_per_step if self.run.tokens_per_step else None

    def charged_tokens(self, step: float) -> float | None:
        """FLOPs until ``step``, in trained tokens that cost as much; None if they are unknown."""
        trained = self.tokens(step)
        if self.unknown or trained is None:
            return None
        saved = sum(self._until(step, *self.run.series(tag)) for tag in SAVED_OF_STEP)
        steps, scored = self._scored
        examples = self._until(step, np.concatenate([[0], steps]), np.concatenate([[0.0], scored]))
        return trained * (1 - saved) + examples * (self._example or 0.0) / 3 + (self._prepaid or 0.0)

    def _last(self, tag: str) -> float:
        values = self.run.series(tag)[1]
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else 0.0

    @staticmethod
    def _until(step: float, steps: np.ndarray, values: np.ndarray) -> float:
        finite = np.isfinite(values)
        return float(np.interp(step, steps[finite], values[finite])) if finite.any() else 0.0

    def _prepaid_tokens(self) -> float | None:
        """What the scorers took, in trained tokens; None if there were scorers and that is unknown."""
        record = self.run.record
        if record.losses and record.scorers_flops is not None and self.flops_per_token:
            return record.scorers_flops / self.flops_per_token
        if not self.prepaid_seconds:
            return None if record.losses else 0.0
        steps, seconds = self.run.series(TRAIN_SECONDS)
        if not len(steps) or not 0 < seconds[-1] < math.inf or not self.run.tokens_per_step:
            return None
        return float(self.prepaid_seconds / seconds[-1] * steps[-1] * self.run.tokens_per_step)


def _flops_per_token(run: RunScalars) -> float | None:
    rates, speeds = run.scalars.get(TFLOPS, {}), run.scalars.get(SPEED, {})
    found = [1e12 * rate / speeds[step] for step, rate in rates.items() if speeds.get(step, 0.0) > 0]
    median = float(np.median(found)) if found else math.nan
    return median if 0 < median < math.inf else None


def _batch_size(run: RunScalars) -> float | None:
    """Examples of a step, from what the ledger counted between its first and its last logged step."""
    counts = run.scalars.get(TRAINED, {})
    if not counts:
        return None
    first, last = next(iter(counts)), next(reversed(counts))
    batch = (counts[last] - counts[first]) / (last - first) if last > first else counts[last] / max(1, last)
    return batch if 0 < batch < math.inf else None
