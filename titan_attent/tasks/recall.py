"""``recall``: associative recall with a random seed in the row.

    r1 r0 ... k5 v1 k0 v0 ... ? k0 v0

The seed comes first, then pairs of a key and a value in random order, then one of the keys, whose value is the answer.
A model whose memory holds fewer pairs than there are fails on some inputs, always on the same ones if it is
deterministic. With the seed it can choose by chance what to keep. Keys of a row are distinct.

Source: "Learning randomized algorithms with transformers" (arXiv 2408.10818): 20 pairs, binary values.
"""

from dataclasses import dataclass

import numpy as np

from titan_attent.tasks.task import Rows, SeededTask, option


@dataclass(frozen=True, kw_only=True)
class Recall(SeededTask):
    name = "recall"
    summary = "associative recall with a random seed in the row"

    pairs: int = option(20, "pairs of a key and a value in a row")
    keys: int = option(32, "different keys")
    values: int = option(2, "different values")
    seed_bits: int = option(8, "bits of the random seed; 0 for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.pairs >= 1, f"--pairs is {self.pairs}; set it to 1 or more")
        self.require(
            self.pairs <= self.keys <= 4096, f"--keys is {self.keys}; set it to {self.pairs} (--pairs) to 4,096"
        )
        self.require(2 <= self.values <= 4096, f"--values is {self.values}; set it to 2 to 4,096")
        self.require(0 <= self.seed_bits <= 64, f"--seed-bits is {self.seed_bits}; set it to 0 to 64")

    def words(self) -> tuple[str, ...]:
        keys, values = (f"k{i}" for i in range(self.keys)), (f"v{i}" for i in range(self.values))
        return "r0", "r1", "?", *keys, *values

    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        draws, first_key, first_value = self.draws(split), 3, 3 + self.keys
        inputs = numbers // self.seeds
        keys = draws.orders(inputs, self.keys, what="keys")[:, : self.pairs] + first_key
        values = draws.integers(inputs, self.pairs, self.values, what="values") + first_value
        asked = draws.integers(inputs, 1, self.pairs, what="asked")
        pairs = np.stack((keys, values), axis=2).reshape(len(numbers), -1)
        key, value = (np.take_along_axis(column, asked, axis=1) for column in (keys, values))
        seed = draws.bits(self.seed_rows(numbers), max(1, self.seed_bits), what="seed")[:, : self.seed_bits]
        return Rows.of_table(seed, pairs, np.array([[2]]), key, value, answer=1)
