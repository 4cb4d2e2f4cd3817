"""``parity``: the parity of k hidden bits of a row, with or without the chain of thought that leads to it.

    0 1 1 0 ... = 1                   the answer alone
    0 1 1 0 ... = 0 1 1 0 1 1 1       the chain of thought: the parities of pairs, of pairs of pairs, ... (k - 1 bits)

The positions of the bits are those of the seed, equal in all rows. In the chain, the nodes of a binary tree come level
by level; its last bit is the parity. All bits of the chain count as labels.

Source: Kim and Suzuki, "Transformers provably solve parity efficiently with chain of thought" (arXiv 2410.08633).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_attent.tasks.task import Rows, Task, option

MAX_BITS = 4096
WORDS = ("0", "1", "=")
EQUALS = np.array([[2]])


def parity_tree(leaves: np.ndarray) -> list[np.ndarray]:
    """0 or 1 [n, k], k a power of two -> the levels of the tree: the parities of pairs [n, k / 2], ..., [n, 1]."""
    levels = [leaves]
    while levels[-1].shape[1] > 1:
        levels.append(levels[-1][:, ::2] ^ levels[-1][:, 1::2])
    return levels[1:]


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    name = "parity"
    summary = "the parity of k hidden bits, with or without its chain of thought"

    k: int = option(8, "hidden bits, a power of two; the paper has 8, 16 and 32")
    bits: int = option(64, "bits of a row")
    chain_of_thought: bool = option(False, "write the k - 1 parities of the tree instead of the last one alone")

    def __post_init__(self) -> None:
        self.require(self.k >= 2 and self.k & (self.k - 1) == 0, f"--k is {self.k}; set it to a power of two from 2 on")
        self.require(
            self.k <= self.bits <= MAX_BITS, f"--bits is {self.bits}; set it to {self.k} (--k) to {MAX_BITS:,}"
        )

    def words(self) -> tuple[str, ...]:
        return WORDS

    def positions(self) -> np.ndarray:
        """int64 [k], the hidden bits in the order of the tree's leaves."""
        return self.draws().orders(np.zeros(1, dtype=np.int64), self.bits, what="positions")[0, : self.k].astype(int)

    def facts(self) -> dict[str, Any]:
        return {"positions": self.positions().tolist()}

    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        bits = self.draws(split).bits(numbers, self.bits, what="bits")
        levels = parity_tree(bits[:, self.positions()])
        answer = levels if self.chain_of_thought else levels[-1:]
        return Rows.of_table(bits, EQUALS, *answer, answer=self.k - 1 if self.chain_of_thought else 1)
