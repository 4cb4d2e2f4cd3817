"""``sparse_parity``: the parity of the first k of many bits, on which progressive distillation is studied.

    0 1 1 0 ... = 1

Source: Panigrahi et al., "Progressive distillation induces an implicit curriculum" (arXiv 2410.05464) and its code: 100
bits, of which the first 6 are the support.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_attent.tasks.parity import EQUALS, MAX_BITS, WORDS
from titan_attent.tasks.task import Rows, Task, option


@dataclass(frozen=True, kw_only=True)
class SparseParity(Task):
    name = "sparse_parity"
    summary = "the parity of the first k of many bits"

    k: int = option(6, "bits of the support")
    bits: int = option(100, "bits of a row")

    def __post_init__(self) -> None:
        self.require(self.k >= 1, f"--k is {self.k}; set it to 1 or more")
        self.require(
            self.k <= self.bits <= MAX_BITS, f"--bits is {self.bits}; set it to {self.k} (--k) to {MAX_BITS:,}"
        )

    def words(self) -> tuple[str, ...]:
        return WORDS

    def facts(self) -> dict[str, Any]:
        return {"positions": list(range(self.k))}

    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        bits = self.draws(split).bits(numbers, self.bits, what="bits")
        parity = np.bitwise_xor.reduce(bits[:, : self.k], axis=1)
        return Rows.of_table(bits, EQUALS, parity[:, None], answer=1)
