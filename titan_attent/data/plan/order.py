"""The order of the examples: a pass, and the pool it draws on, as pure functions from positions to example ids.

    position in the pass --(keyed order of the pass)--> place among the selected --> place in the pool --> example id

Nothing is shuffled in memory. A pool is a stretch of the shuffled order of all examples, or all examples as they stand;
a pass trains what was selected of a pool, in an order of its own. Both orders are evaluated where they are needed, so
the state of the data is a few integers, and no part of it names a rank.

Cost: a bitmask of pool/8 bytes and its rank directory of pool/64 bytes; O(log pool) a position.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from titan_attent.foundations.counter_rng import derive_key, permute, stream

Key = tuple[int, int, int]
"""Of an order: (seed, round, pass); round 0 for the orders of all examples, which are numbered through."""

_BLOCK_BYTES = 64
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_POPCOUNT = _BITS.sum(axis=1).astype(np.uint8)
# _SELECT[byte, j]: the place of the j-th set bit.
_SELECT = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int64)


class SelectedPlaces:
    """A set of places in [0, size). ``select(j)`` is the j-th smallest. Without a bitmask all places are in the set.

    Args:
        size: of the pool.
        bitmask: uint8 [ceil(size / 8)], little-endian bits, or None for all.
    """

    def __init__(self, size: int, *, bitmask: np.ndarray | None = None):
        self.size = size
        self.bitmask = bitmask
        if bitmask is None:
            self._length = size
            return
        self._blocks = np.zeros((-(-bitmask.size // _BLOCK_BYTES), _BLOCK_BYTES), dtype=np.uint8)
        self._blocks.reshape(-1)[: bitmask.size] = bitmask
        self.bitmask = self._blocks.reshape(-1)[: bitmask.size]  # one copy; the one given may go
        # _before[b]: selected places in the blocks before b.
        self._before = np.zeros(len(self._blocks) + 1, dtype=np.int64)
        np.cumsum(_POPCOUNT[self._blocks].sum(axis=1, dtype=np.int64), out=self._before[1:])
        self._length = int(self._before[-1])

    def __len__(self) -> int:
        return self._length

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """int64 [n], each in [0, len) -> int64 [n], the places at those ranks of the sorted set."""
        if self.bitmask is None:
            return ranks
        block = np.searchsorted(self._before, ranks, side="right") - 1
        left = ranks - self._before[block]
        rows = self._blocks[block]
        until = np.cumsum(_POPCOUNT[rows], axis=1, dtype=np.int64)
        byte = (until <= left[:, None]).sum(axis=1)
        row = np.arange(len(ranks))
        left -= np.where(byte > 0, until[row, np.maximum(byte, 1) - 1], 0)
        return (block * _BLOCK_BYTES + byte) * 8 + _SELECT[rows[row, byte], left]


@dataclass(frozen=True)
class Pool:
    """The candidates of a round: ``size`` places, each of which holds an example.

    Attributes:
        num_examples: N.
        order: key of the shuffled order of all examples, of which the pool is a stretch. None: place i is example i.
        start: where the stretch starts, 0 without an order.
        size: number of candidates.
    """

    num_examples: int
    order: Key | None = None
    start: int = 0
    size: int = 0

    @classmethod
    def whole(cls, num_examples: int) -> "Pool":
        """All examples as they stand."""
        return cls(num_examples, size=num_examples)

    def ids(self, places: Tensor) -> Tensor:
        """int64 [n], each in [0, size) -> int64 [n], the examples there."""
        if self.order is None:
            return places
        return permute(places + self.start, self.num_examples, derive_key(stream("order"), *self.order))


@dataclass
class OrderCursor:
    """Where the shuffled orders of all examples stand: stretch after stretch of one order, then of the next.

    Attributes:
        num_examples, seed: of the orders, which are numbered through from 0.
        order, start, size: the stretch taken last.
    """

    num_examples: int
    seed: int
    order: int = 0
    start: int = 0
    size: int = 0

    def take(self, size: int | None = None, *, at_least: int = 1) -> None:
        """Go to the next ``size`` examples, None for all that are left; to a new order where too few are left."""
        start = self.start + self.size
        if self.num_examples - start < (size or at_least):
            self.order, start = self.order + 1, 0
        self.start, self.size = start, size or self.num_examples - start

    def take_the_rest(self) -> None:
        """Lengthen the stretch to the end of its order."""
        self.size = self.num_examples - self.start

    def pool(self) -> Pool:
        """The stretch."""
        return Pool(self.num_examples, order=(self.seed, 0, self.order), start=self.start, size=self.size)

    def state_dict(self) -> dict[str, int]:
        return {"order": self.order, "start": self.start, "size": self.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order, self.start, self.size = state["order"], state["start"], state["size"]


@dataclass(frozen=True)
class Pass:
    """One pass over a selection: all that fixes which examples come when.

    Attributes:
        pool: what was chosen from.
        selected: the chosen places of the pool.
        order: key of the order of this pass; None: in the order of the pool, for a stretch that is shuffled already.
        batch_size: G, examples of a global batch.
        num_batches: global batches of this pass; what does not fill one is left out of this pass.
        round: the teacher's round, for the trace.
        weighted: whether the teacher's weights may differ from 1.
        strategy: the rule in force, "uniform" where everything is trained.
    """

    pool: Pool
    selected: SelectedPlaces
    order: Key | None
    batch_size: int
    num_batches: int
    round: int = 0
    weighted: bool = False
    strategy: str = "uniform"

    @property
    def turn(self) -> tuple[int, ...]:
        """What tells this pass from every other of the run: an example comes once in it."""
        return (self.round, *(self.order or (0, 0, 0)), *(self.pool.order or (0, 0, 0)), self.pool.start)

    def places(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """The places in the pool of ``rows`` of each of the global batches [start, stop), int64 [n], in that order."""
        ranks = torch.arange(start * self.batch_size, stop * self.batch_size).view(-1, self.batch_size)
        ranks = ranks[:, rows].flatten()
        if self.order is not None:
            ranks = permute(ranks, len(self.selected), derive_key(stream("order"), *self.order))
        return torch.from_numpy(self.selected.select(ranks.numpy()))

    def ids(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """The examples there, int64 [n]; all G rows of a batch are its examples in global order."""
        return self.pool.ids(self.places(start, stop, rows))
