"""Random numbers of rows: each depends on (seed, task, split, what is drawn, row, column) alone.

So a row is the same on every machine, and rows can be generated in parts and in any order.

Cost: one hash (foundations/counter_rng.py) gives 64 bits. An integer below a power of two takes as many bits as it has;
another takes 32, which makes its values equally likely up to 2^-24 for those below 256. An order of up to 8 elements
is one integer, the row of a table; a longer one sorts 32 bits per element, beyond 64 elements 64 bits. Elements with
equal bits, one order of 2^18 of 64 elements, come in their own order.

Cost: per hash about 20 integer operations.
"""

import math
from functools import cache
from itertools import permutations

import numpy as np
import torch

from titan_attent.foundations.counter_rng import derive_key, hash_ids, stream

MAX_SIZE = 2**16
"""The largest number of values of an integer, and of elements of an order."""

TABLE_SIZE = 8
"""Orders of up to as many elements are in a table: 40,320 of 8."""


class Draws:
    """The random numbers of the rows of one split of a task.

    Args:
        seed: the seed of the task.
        name: the name of the task.
        split: the name of the split; "" for what all splits share.
    """

    def __init__(self, seed: int, *, name: str, split: str = ""):
        self._fields = (seed, stream(f"tasks/{name}"), stream(f"tasks/split/{split}"))

    def _hashes(self, rows: np.ndarray, num: int, what: str) -> np.ndarray:
        """int64 [n], rows -> uint64 [n, num]."""
        ids = torch.from_numpy(rows[:, None] * num + np.arange(num))
        return hash_ids(ids, derive_key(*self._fields, stream(what))).numpy().view(np.uint64)

    def integers(self, rows: np.ndarray, num: int, below: int, *, what: str) -> np.ndarray:
        """Independent integers in [0, below).

        Args:
            rows: int64 [n], the numbers of the rows.
            num: integers per row.
            below: 1 to ``MAX_SIZE``.
            what: names the draw; draws of different names are independent.

        Returns:
            int16 [n, num], or int32 where ``below`` exceeds 2^15.
        """
        assert 1 <= below <= MAX_SIZE
        dtype = np.dtype(np.int16 if below <= 2**15 else np.int32)
        if below == 1:
            return np.zeros((len(rows), num), dtype=dtype)
        is_power = below & (below - 1) == 0
        bits = below.bit_length() - 1 if is_power else 32
        lane = next(size for size in (8, 16, 32) if bits <= size)
        lanes = self._hashes(rows, -(-num * lane // 64), what).astype("<u8", copy=False).view(f"<u{lane // 8}")[:, :num]
        if is_power:
            return (lanes & (below - 1)).astype(dtype)
        return ((lanes.astype(np.uint64) * np.uint64(below)) >> np.uint64(32)).astype(dtype)

    def bits(self, rows: np.ndarray, num: int, *, what: str) -> np.ndarray:
        """Independent bits: int8 [n, num]; 64 of them take one hash."""
        hashes = self._hashes(rows, -(-num // 64), what).astype("<u8", copy=False)
        return np.unpackbits(hashes.view(np.uint8), axis=1, count=num, bitorder="little").view(np.int8)

    def orders(self, rows: np.ndarray, size: int, *, what: str) -> np.ndarray:
        """A random order of [0, size) per row, each equally likely: int16 [n, size], or int32 beyond 2^15."""
        assert 1 <= size <= MAX_SIZE
        if size <= TABLE_SIZE:
            return _all_orders(size)[self.integers(rows, 1, math.factorial(size), what=what)[:, 0]]
        # The low bits of a hash are replaced by the element: so sorting the hashes carries the elements along.
        bits = (size - 1).bit_length()
        lane = np.dtype("<u4" if bits <= 6 else "<u8")
        hashes = self._hashes(rows, -(-size * lane.itemsize // 8), what).astype("<u8", copy=False).view(lane)[:, :size]
        mask = lane.type((1 << bits) - 1)
        keys = (hashes & ~mask) | np.arange(size, dtype=lane)
        keys.sort(axis=1)
        return (keys & mask).astype(np.int16 if size <= 2**15 else np.int32)


@cache
def _all_orders(size: int) -> np.ndarray:
    """int16 [size!, size]."""
    return np.array(list(permutations(range(size))), dtype=np.int16)
