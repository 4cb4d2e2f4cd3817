"""The order of the examples: a pass and its pool, as pure functions from positions to example ids.

    position in the pass --(keyed order of the pass)--> index among the selected --> slot of the pool --> example id

With groups of m examples, the order of all examples is one of whole groups: those with the ids g m to g m + m - 1 stay
next to each other. So a batch of a multiple of m never cuts a group.

Nothing is shuffled in memory. A pool is a span of the shuffled order of all examples, or all examples in the order of
their ids. A pass trains the selected slots of a pool, in its own order. Both orders are evaluated when needed, so the
state of the data is a few integers, and none of them depends on a rank.

Cost: a bitmask of pool/8 bytes and its directory of pool/64 bytes; O(log pool) time per position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from titan_attent.foundations.counter_rng import derive_key, permute, stream, unpermute

Key = tuple[int, int, int]
"""The key of an order: (seed, round, pass). The orders of all examples have round 0 and consecutive pass numbers."""

_BLOCK_BYTES = 64
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_POPCOUNT = _BITS.sum(axis=1).astype(np.uint8)
# _SELECT[byte, j]: the index of the j-th set bit.
_SELECT = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int64)


class SelectedSlots:
    """A set of slots in [0, size). ``select(j)`` is the j-th smallest. Without a bitmask all slots are in the set.

    Args:
        size: the size of the pool.
        bitmask: uint8 [ceil(size / 8)], little-endian bits, or None for all slots.
    """

    def __init__(self, size: int, *, bitmask: np.ndarray | None = None):
        self.size = size
        self.bitmask = bitmask
        if bitmask is None:
            self._length = size
            return
        self._blocks = np.zeros((-(-bitmask.size // _BLOCK_BYTES), _BLOCK_BYTES), dtype=np.uint8)
        self._blocks.reshape(-1)[: bitmask.size] = bitmask
        self.bitmask = self._blocks.reshape(-1)[: bitmask.size]  # the only copy; the caller may drop its own
        # _before[b]: number of selected slots in the blocks before b.
        self._before = np.zeros(len(self._blocks) + 1, dtype=np.int64)
        np.cumsum(_POPCOUNT[self._blocks].sum(axis=1, dtype=np.int64), out=self._before[1:])
        self._length = int(self._before[-1])

    def __len__(self) -> int:
        return self._length

    def contains(self, slots: np.ndarray) -> np.ndarray:
        """int64 [n], each in [0, size) -> bool [n], whether they are in the set."""
        if self.bitmask is None:
            return np.ones(len(slots), dtype=bool)
        return (self.bitmask[slots >> 3] >> (slots & 7).astype(np.uint8) & 1).astype(bool)

    def num_below(self, slot: int) -> int:
        """The number of slots of the set that are below ``slot``, 0 to size."""
        if self.bitmask is None:
            return slot
        block, rest = divmod(slot, _BLOCK_BYTES * 8)
        if not rest:
            return int(self._before[block])
        bits = np.unpackbits(self._blocks[block], count=rest, bitorder="little")
        return int(self._before[block]) + int(bits.sum())

    def select(self, indices: np.ndarray) -> np.ndarray:
        """Indices in the sorted set, int64 [n], each in [0, len) -> the slots with these indices, int64 [n]."""
        if self.bitmask is None:
            return indices
        block = np.searchsorted(self._before, indices, side="right") - 1
        index_in_block = indices - self._before[block]
        rows = self._blocks[block]
        counts = np.cumsum(_POPCOUNT[rows], axis=1, dtype=np.int64)
        byte = (counts <= index_in_block[:, None]).sum(axis=1)
        row = np.arange(len(indices))
        index_in_byte = index_in_block - np.where(byte > 0, counts[row, np.maximum(byte, 1) - 1], 0)
        return (block * _BLOCK_BYTES + byte) * 8 + _SELECT[rows[row, byte], index_in_byte]


@dataclass(frozen=True)
class Pool:
    """The candidates of a round: ``size`` slots, each with one example.

    Attributes:
        num_examples: N, the size of the data set.
        order: key of the shuffled order of all examples; the pool is a span of it. None: slot i has example i.
        start: start of the span in this order; 0 if there is no order.
        size: number of candidates.
        group_size: m, a divisor of N: examples that stay next to each other in the order.
    """

    num_examples: int
    order: Key | None = None
    start: int = 0
    size: int = 0
    group_size: int = 1

    @classmethod
    def whole(cls, num_examples: int) -> "Pool":
        """All examples in the order of their ids."""
        return cls(num_examples, size=num_examples)

    def ids(self, slots: Tensor) -> Tensor:
        """Slots, int64 [n], each in [0, size) -> the example ids in them, int64 [n]."""
        if self.order is None:
            return slots
        return self._of_groups(permute, slots + self.start)

    def contains(self, ids: Tensor) -> Tensor:
        """Example ids, int64 [n] -> bool [n], whether they are in the pool."""
        slots = ids
        if self.order is not None:
            slots = self._of_groups(unpermute, ids)
        return (slots >= self.start) & (slots < self.start + self.size)

    def _of_groups(self, order: Callable[[Tensor, int, int], Tensor], positions: Tensor) -> Tensor:
        """Positions, int64 [n], with their groups moved by ``order``: permute or unpermute."""
        assert self.order is not None
        key, m = derive_key(stream("order"), *self.order), self.group_size
        if m == 1:
            return order(positions, self.num_examples, key)
        return order(positions // m, self.num_examples // m, key) * m + positions % m


@dataclass
class OrderCursor:
    """A cursor in the shuffled orders of all examples: it takes span after span of one order, then of the next.

    Attributes:
        num_examples, seed: size and seed of the orders, which are numbered from 0.
        group_size: as in :class:`Pool`.
        order, start, size: the current span: the one that was taken last.
    """

    num_examples: int
    seed: int
    order: int = 0
    start: int = 0
    size: int = 0
    group_size: int = 1

    def take(self, size: int | None = None, *, at_least: int = 1) -> None:
        """Take the next ``size`` examples, or all remaining ones (None), as the current span.

        If fewer than ``size`` (``at_least`` for None) remain, the span is at the start of the next order.
        """
        start = self.start + self.size
        if self.num_examples - start < (size or at_least):
            self.order, start = self.order + 1, 0
        self.start, self.size = start, size or self.num_examples - start

    def take_remaining(self) -> None:
        """Extend the current span to the end of its order."""
        self.size = self.num_examples - self.start

    def pool(self) -> Pool:
        """The current span as a pool."""
        order = (self.seed, 0, self.order)
        return Pool(self.num_examples, order=order, start=self.start, size=self.size, group_size=self.group_size)

    def state_dict(self) -> dict[str, int]:
        return {"order": self.order, "start": self.start, "size": self.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order, self.start, self.size = state["order"], state["start"], state["size"]


@dataclass(frozen=True)
class Pass:
    """One pass over a selection: everything that determines which example is trained at which step.

    Attributes:
        pool: the candidates of the selection.
        selected: the selected slots of the pool.
        order: key of the order of this pass; None to keep the order of the pool, whose span is shuffled already.
        batch_size: G, number of examples of a global batch.
        num_batches: global batches of this pass; examples that do not fill one are left out of this pass.
        round: the teacher's round, for the trace.
        weighted: whether the teacher's weights may differ from 1.
        strategy: the current selection strategy, "uniform" if everything is trained.
    """

    pool: Pool
    selected: SelectedSlots
    order: Key | None
    batch_size: int
    num_batches: int
    round: int = 0
    weighted: bool = False
    strategy: str = "uniform"

    row_shape: ClassVar[tuple[int, ...]] = ()
    """Shape of the slots of one row: a row is one example. A packed row holds several (packed.py)."""

    @property
    def visit_key(self) -> tuple[int, ...]:
        """Integers that identify this pass within the run; an example is visited once per pass."""
        return (self.round, *(self.order or (0, 0, 0)), *(self.pool.order or (0, 0, 0)), self.pool.start)

    def visit_key_of(self, batch: int) -> tuple[int, ...]:
        """The key of the visits in global batch ``batch``: that of the pass."""
        return self.visit_key

    def slots(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """The pool slots of ``rows`` of each of the global batches [start, stop), int64 [n], in that order."""
        indices = torch.arange(start * self.batch_size, stop * self.batch_size).view(-1, self.batch_size)
        indices = indices[:, rows].flatten()
        if self.order is not None:
            indices = permute(indices, len(self.selected), derive_key(stream("order"), *self.order))
        return torch.from_numpy(self.selected.select(indices.numpy()))

    def skipped(self, start: int, stop: int, rows: slice = slice(None)) -> None:
        """None: every example is read whole; windows may cut examples (packed.py)."""

    def ids(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """The example ids in these slots, int64 [n]; all G rows of a batch are its examples in global order."""
        return self.pool.ids(self.slots(start, stop, rows))
