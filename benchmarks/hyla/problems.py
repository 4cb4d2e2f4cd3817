"""The two tasks as the authors pose them. A batch is a function of (seed, split, number); no two splits share one.

Shapes: B rows, T tokens, W numbers per token; the answers are at the last tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from titan_attent.tasks.fuzzy_logic import NEW_TERMS, FuzzyLogic
from titan_attent.tasks.sraven import VALUES, Sraven
from titan_attent.tasks.task import IN_DISTRIBUTION, TRAIN


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs float [B, T, W], targets, and what else the score needs."""

    inputs: Tensor
    targets: Tensor
    baseline: Tensor | None = None


class Problem(ABC):
    """One task.

    Attributes:
        splits: what is measured; the last is the one whose figures the authors print.
        score: the name of its score, as a share of 1.
        length, width, outputs: T, W and the number of outputs per token.
        answers: the number of the tokens at which a row is answered; its last ones.
    """

    splits: tuple[str, ...]
    score: str
    length: int
    width: int
    outputs: int
    answers: int

    @abstractmethod
    def batch(self, split: str, number: int, size: int) -> Batch:
        """The batch ``number`` of ``split``."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of ``outputs`` [B, answers, outputs]."""

    @abstractmethod
    def scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The score of each row, [B]."""


class RealFuzzyLogic(Problem):
    """Fuzzy logic with values in [0, 1]: a row has samples (inputs, output), the last output is asked for (and 0).

    The score is R^2 of a row: 1 - squared error / variance of the row's outputs, averaged over rows.
    """

    splits = (IN_DISTRIBUTION, "held_out", NEW_TERMS)
    score = "R2"
    outputs = answers = 1

    def __init__(self, *, seed: int, samples: int = 32, held_out_share: float = 0.7):
        self.task = FuzzyLogic(seed=seed, samples=samples, held_out_share=held_out_share)
        self.seed, self.length, self.width = seed, samples, self.task.variables + 1

    def batch(self, split: str, number: int, size: int) -> Batch:
        functions = self.task.functions[split]
        rng = np.random.default_rng([self.seed, [TRAIN, *self.splits].index(split), number])
        negated = torch.from_numpy(functions[rng.integers(len(functions), size=size)])  # [B, terms, variables]
        x = torch.from_numpy(rng.random((size, self.length, self.width - 1), dtype=np.float32))
        values = torch.where(negated[:, None], 1 - x[:, :, None], x[:, :, None])  # [B, T, terms, variables]
        y = values.amin(dim=3).amax(dim=2)
        inputs = torch.cat((x, y[:, :, None]), dim=2)
        inputs[:, -1, -1] = 0
        return Batch(inputs=inputs, targets=y[:, -1], baseline=y.var(dim=1, correction=0))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(outputs[:, 0, 0], batch.targets)

    def scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert batch.baseline is not None
        return 1 - (outputs[:, 0, 0] - batch.targets).square() / batch.baseline


class OneHotSraven(Problem):
    """SRAVEN with one-hot tokens: eight panels of four features, then four empty tokens, which are the answer.

    The score of a row is 1 if all its features are right.
    """

    splits = (IN_DISTRIBUTION, "held_out")
    score = "accuracy"
    width = outputs = VALUES

    def __init__(self, *, seed: int):
        self.task = Sraven(seed=seed)
        self.length, self.answers = 9 * self.task.features, self.task.features

    def batch(self, split: str, number: int, size: int) -> Batch:
        rows = self.task.rows(split, np.arange(number * size, (number + 1) * size))
        words = torch.from_numpy(rows.words.reshape(size, self.length).astype(np.int64))
        inputs = F.one_hot(words, VALUES).float()
        inputs[:, -self.task.features :] = 0
        return Batch(inputs=inputs, targets=words[:, -self.task.features :])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten())

    def scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs.argmax(dim=2) == batch.targets).all(dim=1).float()


PROBLEMS: dict[str, Any] = {"fuzzy_logic": RealFuzzyLogic, "sraven": OneHotSraven}
