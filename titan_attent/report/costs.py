"""The cost of a run up to a step: in tokens, in FLOPs with scoring charged, in seconds.

    tokens    trained tokens: the step x the tokens of a global batch
    FLOPs     trained tokens x FLOPs per token as torchtitan counts them (tflops / throughput), minus the share that
              freezing and the highway saved (freezing/saved_of_step, highway/saved_of_step)
              + a third of the FLOPs per token for each token of ledger/examples_scored: scoring is a forward pass
              + the FLOPs of the scorers whose losses the run reads, spent before it: their own count where it is
              recorded (cost.json), else their seconds at the pace of this run
    seconds   of the run, and of its scorers

Validation is not charged. Where a run does not log its FLOPs per token, its FLOPs are expressed as the number of
trained tokens of equal cost: two runs of one model can be compared by them, too.

Cost: none beyond reading the scalars.
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
    """The costs of one run.

    Attributes:
        flops_per_token: of training; None where the run did not log it.
        prepaid_seconds: the time of its scorers.
        unknown: why its FLOPs are unknown, in words; None if they are known.
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
        self._tokens_per_example: float | None = run.record.tokens_per_example
        batch = run.record.batch_size or _batch_size(run)
        if self._tokens_per_example is None and batch and run.tokens_per_step:
            self._tokens_per_example = run.tokens_per_step / batch
        self._prepaid = self._prepaid_tokens()
        if not run.tokens_per_step:
            self.unknown = f"{run.path} does not report its number of tokens"
        elif self._last(SCORED) and self._tokens_per_example is None:
            self.unknown = (
                f"{run.path} does not report the cost of the {self._last(SCORED):,.0f} examples that it scored"
            )
        elif self._prepaid is None:
            self.unknown = f"{run.path} does not report the cost of its scorers"

    @property
    def has_scoring(self) -> bool:
        """Whether anything besides training is charged."""
        return self._last(SCORED) > 0 or bool(self._prepaid)

    def tokens(self, step: float) -> float | None:
        """Tokens trained up to ``step``; None if unknown."""
        return step * self.run.tokens_per_step if self.run.tokens_per_step else None

    def charged_tokens(self, step: float) -> float | None:
        """FLOPs up to ``step``, as the number of trained tokens of equal cost; None if unknown."""
        trained = self.tokens(step)
        if self.unknown or trained is None:
            return None
        saved = sum(self._until(step, *self.run.series(tag)) for tag in SAVED_OF_STEP)
        steps, scored = self._scored
        examples = self._until(step, np.concatenate([[0], steps]), np.concatenate([[0.0], scored]))
        return trained * (1 - saved) + examples * (self._tokens_per_example or 0.0) / 3 + (self._prepaid or 0.0)

    def _last(self, tag: str) -> float:
        values = self.run.series(tag)[1]
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else 0.0

    @staticmethod
    def _until(step: float, steps: np.ndarray, values: np.ndarray) -> float:
        finite = np.isfinite(values)
        return float(np.interp(step, steps[finite], values[finite])) if finite.any() else 0.0

    def _prepaid_tokens(self) -> float | None:
        """The cost of the scorers in trained tokens; None if there were scorers and their cost is unknown."""
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
    ratios = [1e12 * rate / speeds[step] for step, rate in rates.items() if speeds.get(step, 0.0) > 0]
    median = float(np.median(ratios)) if ratios else math.nan
    return median if 0 < median < math.inf else None


def _batch_size(run: RunScalars) -> float | None:
    """Examples per step, from the ledger's counts at its first and its last logged step."""
    counts = run.scalars.get(TRAINED, {})
    if not counts:
        return None
    first, last = next(iter(counts)), next(reversed(counts))
    batch = (counts[last] - counts[first]) / (last - first) if last > first else counts[last] / max(1, last)
    return batch if 0 < batch < math.inf else None
