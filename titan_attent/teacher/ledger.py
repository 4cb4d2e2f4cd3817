"""The ledger: what teaching cost; and the audit: what it chose. Host numbers only, ready to log at any step.

Seconds are wall time of the training thread inside the teacher's own work, waits for other ranks included; asynchronous
exchanges cost only what the thread sees of them. ``examples_covered`` counts the data set as covered once when one pass
over a selection ends, whatever its ratio: trained examples are paid for, covered ones are what they stand for.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from titan_attent.sharding import ExampleSharding
from titan_attent.teacher.importance import effective_share, fixed_point_sums, kth_largest


class Ledger:
    """Costs and coverage since the first step of the run; a resume goes on counting.

    Args:
        batch_size: G, examples of a global batch.
        tokens_per_example: for tokens_covered_per_second.
    """

    def __init__(self, *, batch_size: int, tokens_per_example: int):
        self.batch_size = batch_size
        self.tokens_per_example = tokens_per_example
        self.seconds = {"score": 0.0, "select": 0.0, "exchange": 0.0}
        self.examples_trained = 0
        self.examples_covered = 0.0
        self._seconds_before = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def charge(self, account: str) -> Iterator[None]:
        """Add the wall time of the block to ``account``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[account] += time.perf_counter() - start

    def step_done(self, *, covered_per_trained: float) -> None:
        """One global batch was trained; each of its examples stands for ``covered_per_trained`` of the data set."""
        self.examples_trained += self.batch_size
        self.examples_covered += self.batch_size * covered_per_trained

    @property
    def wall_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start

    def metrics(self) -> dict[str, float]:
        """The ``ledger/*`` scalars."""
        wall = max(self.wall_seconds, 1e-9)
        return {
            "ledger/score_seconds": self.seconds["score"],
            "ledger/select_seconds": self.seconds["select"],
            "ledger/exchange_seconds": self.seconds["exchange"],
            "ledger/overhead_percent": 100 * sum(self.seconds.values()) / wall,
            "ledger/examples_trained": float(self.examples_trained),
            "ledger/examples_covered": self.examples_covered,
            "ledger/tokens_covered_per_second": self.examples_covered * self.tokens_per_example / wall,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": dict(self.seconds),
            "wall_seconds": self.wall_seconds,
            "examples_trained": self.examples_trained,
            "examples_covered": self.examples_covered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = dict(state["seconds"])
        self._seconds_before = state["wall_seconds"]
        self._start = time.perf_counter()
        self.examples_trained = state["examples_trained"]
        self.examples_covered = state["examples_covered"]


def audit(
    *,
    scores: Tensor,
    ages: Tensor,
    chosen: Tensor,
    chosen_before: Tensor,
    ever_chosen: Tensor,
    weights: Tensor,
    sharding: ExampleSharding,
) -> dict[str, float]:
    """What a selection looks like: a collective between rounds, a few small all-reduces.

    Args:
        scores: fp32 [num_local] importances; infinities are left out of the statistics.
        ages: int32 [num_local], steps since the loss was seen; negative where there is none.
        chosen, chosen_before, ever_chosen: bool [num_local]; this draw, the one before, any draw up to this one.
        weights: fp32 [num_local], 0 where not chosen.

    Returns:
        importance_mean; importance_p99; effective_sample_size, (sum s)^2 / (N sum s^2) as a share of
        the scored examples; loss_age (mean steps); never_selected (share); overlap (share of this selection that was in
        the one before); max_weight.
    """
    finite = torch.isfinite(scores)
    total, _, num_finite = fixed_point_sums(torch.where(finite, scores, 0.0), finite, sharding=sharding)
    aged = ages >= 0
    counts = sharding.sum(torch.stack([part.sum() for part in (aged, chosen, chosen & chosen_before, ~ever_chosen)]))
    num_aged, num_chosen, num_again, num_never = counts.tolist()
    age = int(sharding.sum(torch.where(aged, ages, 0).long().sum()))
    p99 = kth_largest(scores, lambda n: max(1, n // 100), where=finite, sharding=sharding)
    largest = weights.max() if weights.numel() else weights.new_zeros(())
    return {
        "teacher/importance_mean": total / max(1, num_finite),
        "teacher/importance_p99": p99 or 0.0,
        "teacher/effective_sample_size": effective_share(scores, sharding=sharding),
        "teacher/loss_age": age / max(1, num_aged),
        "teacher/never_selected": num_never / sharding.num_examples,
        "teacher/overlap": num_again / max(1, num_chosen),
        "teacher/max_weight": float(sharding.max(largest.clone())),
    }
