"""The rows of a forward pass over documents: which examples share a row, and how long the row is.

A forward pass for scores or for validation reads each example once. A document that takes a row of ``seq_len`` tokens
for itself wastes the rest of it, so there are two layouts:

    packed    rows of ``seq_len`` tokens that hold several examples, by best fit (packing.py). Only for a model that
              masks documents: otherwise an example would see its neighbours
    short     one example per row, in rows of a few fixed lengths. Padding behind an example changes nothing in a causal
              model. The lengths are those that cost the fewest tokens (:func:`row_lengths`)

A batch has rows of one length, and as many of them as ``batch_size`` rows of ``seq_len`` have tokens for. Examples are
taken in blocks of a fixed number, so which examples share a row does not depend on the number of ranks. Rows that do
not fill a batch wait for the next block. Batches at the end also take shorter examples. So there are never more batches
than with one example per row of ``seq_len``.

Cost: per block one all-reduce of 8 bytes per example, a host sync, and in the packed layout one packing. The ranks
share the reading of the lengths: 4 bytes per document where ids are neighbours, 1 KB where they are a random sample.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.packing import best_fit

BLOCK_TOKENS, MAX_BLOCK_EXAMPLES = 2**24, 2**16
"""A block has about this number of tokens, and at most this number of examples."""
SHORT_STEP = 128
"""Rows of the short layout are multiples of this number of tokens, which GPU kernels like; finer for short rows."""


class LengthsOfExamples(Protocol):
    """The part of a data set that the layout reads."""

    seq_len: int
    num_pairs: int

    def __len__(self) -> int: ...

    def row_lengths_of(self, ids: np.ndarray) -> np.ndarray: ...


class Rows(NamedTuple):
    """The rows of one batch of all ranks.

    Attributes:
        ids: int64 [rows, M], the examples of each row in their order, or [rows], one per row; padded with N.
        length: tokens of a row.
    """

    ids: Tensor
    length: int

    def of_rank(self, rank: int, num_ranks: int) -> "Rows":
        """The rows that one of the ranks reads; equally many for each."""
        size = len(self.ids) // num_ranks
        return Rows(self.ids[rank * size : (rank + 1) * size], self.length)


def row_lengths(
    values: np.ndarray, counts: np.ndarray, *, seq_len: int, num: int, multiple_of: int = 1
) -> tuple[int, ...]:
    """At most ``num`` row lengths with which rows of one example each have the fewest tokens in all, ascending.

    Each example takes the shortest row that holds it. Exact among the multiples of a step, by dynamic programming.

    Args:
        values: int64 [n], lengths of examples, 1 to ``seq_len``.
        counts: int64 [n], the number of examples of each length.
        seq_len: the longest row; used for the longest examples only.
        num: 1 or more.
        multiple_of: a divisor of all lengths, except of ``seq_len`` where it does not divide it.
    """
    step = math.lcm(SHORT_STEP if seq_len >= 16 * SHORT_STEP else 8, multiple_of)
    step *= max(1, -(-seq_len // (256 * step)))
    ends = np.append(np.arange(step, seq_len, step), seq_len)
    totals = np.bincount(np.searchsorted(ends, values), weights=counts, minlength=len(ends)).cumsum()
    ends = ends[: int(np.searchsorted(totals, totals[-1])) + 1]  # the last row length holds the longest example
    totals = np.concatenate(([0.0], totals[: len(ends)]))
    # costs[i, j]: tokens of the examples between candidates i - 1 and j, in rows of candidate j.
    costs = (totals[None, 1:] - totals[:-1, None]) * ends[None, :]
    costs[np.tril_indices(len(ends), -1)] = np.inf
    best, chosen = costs[0], list[np.ndarray]()
    for _ in range(min(num, len(ends)) - 1):
        through = np.concatenate(([0.0], best[:-1]))[:, None] + costs
        through[0] = costs[0]
        chosen.append(through.argmin(axis=0))
        best = through.min(axis=0)
    lengths, last = [int(ends[-1])], len(ends) - 1
    for before in reversed(chosen):
        if before[last] == 0:
            break
        last = int(before[last]) - 1
        lengths.append(int(ends[last]))
    return tuple(reversed(lengths))


class ForwardRows:
    """Lays out the examples of a pool in the rows of a forward pass.

    Args:
        examples: lengths of the examples, and their number N.
        lengths: tokens of a row, ascending; the last holds every example. The packed layout has one, ``seq_len``.
        max_examples: the largest number of examples in a row of the packed layout; 0 for the short layout.
        rank, num_ranks: rank in the data-parallel group that shares the reading of the lengths, and its size.
        add_up: an all-reduce SUM of an int64 tensor on the CPU over that group.
    """

    def __init__(
        self,
        examples: LengthsOfExamples,
        *,
        lengths: tuple[int, ...],
        max_examples: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
    ):
        self.examples, self.lengths, self.max_examples = examples, lengths, max_examples
        self.rank, self.num_ranks, self.add_up = rank, num_ranks, add_up
        tokens = max(1, examples.num_pairs // len(examples))
        self.block_size = min(MAX_BLOCK_EXAMPLES, 1 << max(0, (BLOCK_TOKENS // tokens).bit_length() - 1))
        """Examples of a block, a power of two."""

    def rows_per_rank(self, length: int, *, batch_size: int) -> int:
        """Rows of ``length`` tokens in a rank's batch of ``batch_size`` rows of ``seq_len``."""
        return batch_size * self.examples.seq_len // length

    def batches(self, pool: Pool, *, batch_size: int) -> Iterator[Rows]:
        """The batches of all ranks that together hold each example of ``pool`` once. A collective.

        Args:
            batch_size: rows of ``seq_len`` per rank.
        """
        blocks = range(0, pool.size, self.block_size)
        ids = (pool.ids(torch.arange(first, min(first + self.block_size, pool.size))).numpy() for first in blocks)
        return self.batches_of(ids, batch_size=batch_size)

    def batches_of(self, blocks: Iterator[np.ndarray], *, batch_size: int) -> Iterator[Rows]:
        """As :meth:`batches`, for blocks of ids, int64 [n] each."""
        waiting = {length: np.empty(self._shape(0), dtype=np.int64) for length in self.lengths}
        sizes = {length: self.num_ranks * self.rows_per_rank(length, batch_size=batch_size) for length in self.lengths}
        for ids in blocks:
            ids = np.sort(ids)
            for length, rows in self._placed(ids, self._lengths_of(ids)):
                rows = np.concatenate((waiting[length], rows))
                full = len(rows) // sizes[length] * sizes[length]
                for first in range(0, full, sizes[length]):
                    yield Rows(torch.from_numpy(rows[first : first + sizes[length]]), length)
                waiting[length] = rows[full:]
        # What is left, the longest first; the free rows of a batch take shorter examples.
        rest = np.concatenate([waiting[length] for length in reversed(self.lengths)])
        needed = np.repeat(self.lengths[::-1], [len(waiting[length]) for length in reversed(self.lengths)])
        while len(rest):
            length = int(needed[0])
            rows = np.full(self._shape(sizes[length]), len(self.examples), dtype=np.int64)
            taken = rest[: len(rows)]
            rows[: len(taken)] = taken
            yield Rows(torch.from_numpy(rows), length)
            rest, needed = rest[len(taken) :], needed[len(taken) :]

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.max_examples) if self.max_examples else (rows,)

    def _lengths_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n], the lengths of a block; each rank reads its share."""
        lengths = np.zeros(len(ids), dtype=np.int64)
        share = slice(len(ids) * self.rank // self.num_ranks, len(ids) * (self.rank + 1) // self.num_ranks)
        lengths[share] = self.examples.row_lengths_of(ids[share])
        return self.add_up(torch.from_numpy(lengths)).numpy()

    def _placed(self, ids: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(tokens of a row, ids of such rows) of a block."""
        if not self.max_examples:
            slots = np.searchsorted(self.lengths, lengths)
            for slot, length in enumerate(self.lengths):
                yield length, ids[slots == slot]
            return
        (capacity,) = self.lengths
        packed = best_fit(lengths, capacity=capacity, max_examples=self.max_examples)
        sizes = np.diff(packed.starts)
        rows = np.full(self._shape(len(sizes)), len(self.examples), dtype=np.int64)
        window = np.repeat(np.arange(len(sizes)), sizes)
        rows[window, np.arange(len(ids)) - packed.starts[window]] = ids[packed.slots]
        yield capacity, rows
