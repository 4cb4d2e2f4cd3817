"""The order of the examples: (selection, seed, pass, consumed) -> this rank's ids.

A pass trains a selected set once, in the order of its own keyed permutation. Nothing is shuffled in memory: position p
of the pass is example ``select(permute(p))``, evaluated when needed, so the state of the data is three integers (round,
pass, consumed batches) and no part of it names a rank. Global batch b is the positions [b G, (b + 1) G); rank r of W
takes the r-th of W equal contiguous blocks of it, cut again into microbatches. Hence 1, 2 or 3 ranks train the same
examples in the same global order.

Cost: a bitmask of N/8 bytes and its rank directory of N/64 bytes; O(log N) a position.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from titan_attent.keyed import STREAM_ORDER, fold_key, permute

if TYPE_CHECKING:
    from titan_attent.teacher.teacher import Teacher

_BLOCK_BYTES = 64
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_POPCOUNT = _BITS.sum(axis=1).astype(np.uint8)
# _SELECT[byte, j]: the place of the j-th set bit.
_SELECT = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int64)


class SelectedIds:
    """A set of example ids with ``select(j)``, the j-th smallest; everything when built without a bitmask.

    Args:
        num_examples: N.
        bitmask: uint8 [ceil(N / 8)], little-endian bits, or None for all N.
    """

    def __init__(self, num_examples: int, *, bitmask: np.ndarray | None = None):
        self.num_examples = num_examples
        self.bitmask = bitmask
        if bitmask is None:
            self._length = num_examples
            return
        self._blocks = np.zeros((-(-bitmask.size // _BLOCK_BYTES), _BLOCK_BYTES), dtype=np.uint8)
        self._blocks.reshape(-1)[: bitmask.size] = bitmask
        # _before[b]: selected ids in the blocks before b.
        self._before = np.zeros(len(self._blocks) + 1, dtype=np.int64)
        np.cumsum(_POPCOUNT[self._blocks].sum(axis=1, dtype=np.int64), out=self._before[1:])
        self._length = int(self._before[-1])

    def __len__(self) -> int:
        return self._length

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """int64 [n], each in [0, len) -> int64 [n], the ids at those places of the sorted set."""
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
class Pass:
    """One pass over a selection: all that fixes which ids come when.

    Attributes:
        selected: the ids.
        order: the key of the order: (seed, round, pass), round 0 for full passes, which are numbered through.
        batch_size: G, examples of a global batch.
        num_batches: global batches of this pass; what does not fill one is left out of this pass.
        round: the teacher's round, for the trace.
        weighted: whether the teacher's weights may differ from 1.
        strategy: the rule in force, "uniform" for a full pass.
    """

    selected: SelectedIds
    order: tuple[int, int, int]
    batch_size: int
    num_batches: int
    round: int = 0
    weighted: bool = False
    strategy: str = "uniform"

    def ids(self, start: int, stop: int) -> Tensor:
        """The examples of global batches [start, stop): int64 [(stop - start) G], in global order."""
        positions = torch.arange(start * self.batch_size, stop * self.batch_size)
        places = permute(positions, len(self.selected), fold_key(STREAM_ORDER, *self.order))
        return torch.from_numpy(self.selected.select(places.numpy()))


class TeachingSampler:
    """This rank's example ids and weights, microbatch after microbatch, without end.

    The teacher is asked for the next pass when one is used up.

    Args:
        teacher: decides the passes.
        rank, num_ranks: place in the data-parallel group.
        microbatches: gradient accumulation steps of a training step.

    ``state_dict`` is rank-free: it loads under any number of ranks with the same global batch.
    """

    def __init__(self, teacher: "Teacher", *, rank: int = 0, num_ranks: int = 1, microbatches: int = 1):
        if teacher.batch_size % (num_ranks * microbatches):
            raise ValueError(
                f"the global batch of {teacher.batch_size} examples does not split into {num_ranks} ranks x "
                f"{microbatches} microbatches: make it a multiple of {num_ranks * microbatches}"
            )
        self.teacher = teacher
        self.rank, self.num_ranks, self.microbatches = rank, num_ranks, microbatches
        self.batch_size = teacher.batch_size // (num_ranks * microbatches)
        self.step = 0  # global batches served in all passes
        self.consumed = 0  # of them, in the current pass

    def current_pass(self) -> Pass:
        """The pass in progress, the next one when it is used up. A collective when the teacher has to choose."""
        current = self.teacher.current_pass()
        if current is None or self.consumed >= current.num_batches:
            current = self.teacher.next_pass(step=self.step)
            self.consumed = 0
        return current

    def batch_consumed(self) -> None:
        """Note one global batch as served."""
        self.step += 1
        self.consumed += 1

    def local_rows(self, microbatch: int) -> slice:
        """Where this rank's microbatch lies in the global batch."""
        start = (self.rank * self.microbatches + microbatch) * self.batch_size
        return slice(start, start + self.batch_size)

    def local_batches(self, current: Pass, *, start: int) -> Iterator[Tensor]:
        """int64 [batch_size] for every microbatch of the pass from global batch ``start`` on. Pure."""
        for batch in range(start, current.num_batches):
            ids = current.ids(batch, batch + 1)
            for microbatch in range(self.microbatches):
                yield ids[self.local_rows(microbatch)]

    def local_weights(self, current: Pass, *, start: int) -> Iterator[Tensor]:
        """fp32 [batch_size] weights beside :meth:`local_batches`; ones where the pass is not weighted.

        A collective for every ``flush_every`` global batches of a weighted pass, when the first of them is asked for:
        consume it in step on all ranks.
        """
        block = self.teacher.buffer.flush_every
        for first in range(start, current.num_batches, block):
            last = min(first + block, current.num_batches)
            weights = torch.ones((last - first) * current.batch_size)
            if current.weighted:
                weights = self.teacher.weights_of(current.ids(first, last))
            for weights_G in weights.view(last - first, -1):
                for microbatch in range(self.microbatches):
                    yield weights_G[self.local_rows(microbatch)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(example ids int64 [batch_size], their weights fp32 [batch_size]) of every microbatch."""
        while True:
            current, start = self.current_pass(), self.consumed
            ids_and_weights = zip(
                self.local_batches(current, start=start), self.local_weights(current, start=start), strict=True
            )
            for i, (ids, weights) in enumerate(ids_and_weights):
                if (i + 1) % self.microbatches == 0:
                    self.batch_consumed()
                yield ids, weights

    def state_dict(self) -> dict[str, Any]:
        teacher = self.teacher
        return {"step": self.step, "round": teacher.round, "pass": teacher.pass_index, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.consumed = state["step"], state["consumed"]
