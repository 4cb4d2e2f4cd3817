"""The interface of a task, and the rows that it generates.

A task is a dataclass whose fields are its options; each field's metadata has its help for the command line. Words are
numbered by their position in :meth:`Task.words`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from titan_attent.tasks.draws import Draws

TRAIN, IN_DISTRIBUTION = "train", "in_distribution"
"""The split to train on, and the split of other rows of the same distribution, which every task has."""


class Rows(NamedTuple):
    """Rows of words, one after the other; T words in n rows.

    Attributes:
        words: integers [T], numbers of words.
        ends: int64 [n], where each row ends in ``words``, exclusive.
        counts: bool [T], whether a word is part of the answer, which is all that counts as a label.
    """

    words: np.ndarray
    ends: np.ndarray
    counts: np.ndarray

    @classmethod
    def of_table(cls, *columns: np.ndarray, answer: int) -> "Rows":
        """Rows of one length.

        Args:
            columns: integers [n, ...] each, with n = 1 where all rows have the same; joined along the second axis.
            answer: the number of words at the end of each row that are its answer.
        """
        n = max(len(column) for column in columns)
        widths = [column.shape[1] for column in columns]
        table = np.empty((n, sum(widths)), dtype=np.int16)
        for column, stop, width in zip(columns, np.cumsum(widths).tolist(), widths, strict=True):
            table[:, stop - width : stop] = column
        counts = np.zeros(table.shape, dtype=bool)
        counts[:, -answer:] = True
        return cls(table.ravel(), np.arange(1, n + 1, dtype=np.int64) * table.shape[1], counts.ravel())


def option(default: Any, text: str) -> Any:
    """A field of a task with its help for the command line."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task with its options. ValueError from the constructor if they do not fit each other.

    Attributes:
        name: its name on the command line.
        summary: one line on what it tests.
        splits: the validation splits. The first has other rows of the distribution that is trained on.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = (IN_DISTRIBUTION,)

    seed: int = option(0, "seed of the task: of its rows, and of what they have in common")

    @abstractmethod
    def words(self) -> tuple[str, ...]:
        """The vocabulary: distinct words without white space."""

    @abstractmethod
    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        """The rows with these ``numbers``, int64 [n], of a split: "train" or one of ``splits``. Pure."""

    def facts(self) -> dict[str, Any]:
        """What the rows have in common, such as hidden positions, in types of JSON; task.json has them."""
        return {}

    def rows_per_input(self) -> int:
        """How many rows in a row share one input."""
        return 1

    def draws(self, split: str = "") -> Draws:
        """The random numbers of a split; of no split, those of what all rows have in common."""
        return Draws(self.seed, name=self.name, split=split)

    def require_share(self, flag: str, value: float) -> None:
        """ValueError unless the option ``flag`` is a number from 0 to 1."""
        self.require(0 <= value <= 1, f"{flag} is {value:g}; set it to a number from 0 to 1")

    def require(self, holds: bool, message: str) -> None:
        """ValueError with ``message`` unless an option is as it must be."""
        if not holds:
            raise ValueError(f"{self.name}: {message}")


@dataclass(frozen=True, kw_only=True)
class SeededTask(Task):
    """A task whose rows hold a random seed: several rows in a row share an input, and have different seeds."""

    seeds: int = option(1, "rows per input, each with its own random seed")
    fixed_seed: bool = option(False, "all rows have the same random seed: the control")

    def __post_init__(self) -> None:
        self.require(self.seeds >= 1, f"--seeds is {self.seeds}; set it to 1 or more")

    def rows_per_input(self) -> int:
        return self.seeds

    def seed_rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows that seeds are drawn for, int64 [n]: with a fixed seed, row 0 for all."""
        return np.zeros_like(numbers) if self.fixed_seed else numbers
