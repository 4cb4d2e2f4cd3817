"""``sraven``: symbolic Raven's matrices. The row shows eight panels of a 3 x 3 grid, the ninth is the answer.

    7 0 2 1   3 0 2 5   ...        9 panels of 4 features, values 0 to 7

Each feature follows one rule in all three rows of the grid, modulo 8:

    constant        a, a, a
    progression     a, a + d, a + 2 d, with d = 1, 2, -1 or -2
    sum             a, b, a + b
    difference      a, b, a - b
    distribute      three different values, the same in all rows, in any order

In each column of the grid the features are in an order of their own, equal in its three panels. So the model has to
find out which feature of one column belongs to which of another. A task is a multiset of rules, one per feature.

    in_distribution   multisets that are trained on
    held_out          the other multisets

Source: Schug et al., "Attention as a hypernetwork" (ICLR 2025, arXiv 2406.05816) and its code, where the features of
the answer are predicted at once.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, permutations
from typing import Any

import numpy as np

from titan_attent.tasks.fuzzy_logic import HELD_OUT
from titan_attent.tasks.task import IN_DISTRIBUTION, TRAIN, Rows, Task, option

VALUES, GRID = 8, 3
RULES = ("constant", "+1", "+2", "-1", "-2", "sum", "difference", "distribute")
DISTRIBUTE = RULES.index("distribute")
# The second and the third value of a rule are a * _OF_A + b * _OF_B + _PLUS, modulo 8; distribute has its own.
_OF_A = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [0, 1], [0, 1], [0, 0]], dtype=np.int8)
_OF_B = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [1, 1], [1, -1], [0, 0]], dtype=np.int8)
_PLUS = np.array([[0, 0], [1, 2], [2, 4], [-1, -2], [-2, -4], [0, 0], [0, 0], [0, 0]], dtype=np.int8)
_TRIPLES = np.array(list(permutations(range(VALUES), GRID)), dtype=np.int8)
_ORDERS = np.array(list(permutations(range(GRID))))


@dataclass(frozen=True, kw_only=True)
class Sraven(Task):
    name = "sraven"
    summary = "symbolic Raven's matrices, with held-out combinations of rules"
    splits = (IN_DISTRIBUTION, HELD_OUT)

    features: int = option(4, "features of a panel")
    held_out_share: float = option(0.25, "share of the multisets of rules that are held out")

    def __post_init__(self) -> None:
        self.require(1 <= self.features <= 4, f"--features is {self.features}; set it to 1 to 4")
        self.require_share("--held-out-share", self.held_out_share)
        for split, tasks in self.tasks.items():
            self.require(len(tasks) > 0, f"--held-out-share {self.held_out_share} leaves the split {split} no rules")

    @cached_property
    def tasks(self) -> dict[str, np.ndarray]:
        """Split -> its multisets of rules, int64 [tasks, features]."""
        tasks = np.array(list(combinations_with_replacement(range(len(RULES)), self.features)))
        tasks = tasks[self.draws().orders(np.zeros(1, dtype=np.int64), len(tasks), what="tasks")[0]]
        held_out, trained = np.split(tasks, [int(self.held_out_share * len(tasks))])
        return {TRAIN: trained, IN_DISTRIBUTION: trained, HELD_OUT: held_out}

    def facts(self) -> dict[str, Any]:
        return {"rules": RULES, "tasks": {split: tasks.tolist() for split, tasks in self.tasks.items()}}

    def words(self) -> tuple[str, ...]:
        return tuple(map(str, range(VALUES)))

    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        draws, n, size = self.draws(split), len(numbers), self.features
        tasks = self.tasks[split]
        rules = tasks[draws.integers(numbers, 1, len(tasks), what="task")[:, 0]]
        drawn = draws.integers(numbers, 2 * size * GRID, VALUES, what="values").astype(np.int8)
        a, b = drawn.reshape(n, 2, size, GRID).swapaxes(0, 1)
        values = np.empty((GRID, n, size, GRID), dtype=np.int8)  # by column, row, feature and row of the grid
        values[0] = a
        for column in (1, 2):
            of_a, of_b, plus = (table[rules, column - 1][..., None] for table in (_OF_A, _OF_B, _PLUS))
            values[column] = (a * of_a + b * of_b + plus) & (VALUES - 1)
        row, feature = np.nonzero(rules == DISTRIBUTE)
        items = numbers[row] * size + feature
        triples = _TRIPLES[draws.integers(items, 1, len(_TRIPLES), what="triple")[:, 0]]
        orders = _ORDERS[draws.integers(items, GRID, len(_ORDERS), what="order")]
        values[:, row, feature] = np.take_along_axis(triples[:, None], orders, axis=2).transpose(2, 0, 1)
        # [column, row, position, row of the grid]: each column has its own order of the features.
        shuffles = np.array(list(permutations(range(size))))
        shuffles = shuffles[draws.integers(numbers, GRID, len(shuffles), what="shuffle").T]
        panels = np.take_along_axis(values, shuffles[..., None], axis=2)
        return Rows.of_table(panels.transpose(1, 3, 0, 2).reshape(n, -1), answer=size)
