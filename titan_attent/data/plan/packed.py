"""Passes over examples of different lengths: selected examples, packed into windows of one length.

    all ids, in runs of 256 neighbours --(keyed order of the runs)--> blocks of 256 runs
    block --(its selected ids, shuffled)--> windows (packing.py), shuffled --> window of the pass

A block's windows depend on (key, block, selection) alone, so every rank finds the same windows in the same order. Once
per pass the ranks share the counting of the windows: each counts those of some blocks. From then on a position in a
pass is the number of a window. The reader threads pack the block of a window when they need it, once per block and
rank.

With ``packing = "concatenate"``, for comparison, a block's examples are joined in their shuffled order and cut at the
ends of windows, which are not shuffled; the block's last window is padded. An example that crosses the end of a window
has its first tokens there and the others at the start of the next window, so each token is trained once per pass.

Neighbouring ids lie next to each other on disk, so reading the lengths of a run takes one or two short reads. The
documents of a run were written one after the other; the shuffle spreads them over the windows of a block.

Cost: per pass 4 bytes read per document, shared by the ranks, one packing per block, shared by the ranks, and one
all-reduce of 8 bytes per block. Per block and rank: at most 512 short reads, one packing, and about 2 MB while it is in
use. The state of a pass is (key, number of batches).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.plan.order import Key, Pool, SelectedSlots
from titan_attent.data.plan.packing import best_fit, concatenate, num_concatenated, num_windows, window_limit
from titan_attent.foundations.counter_rng import derive_key, permute, stream

BEST_FIT, CONCATENATE = PACKINGS = ("best_fit", "concatenate")
"""The values of ``[data] packing``."""

RUN = 256
"""Number of neighbouring ids that stay together in the order of a pass."""
BLOCK_RUNS = 256
"""Number of runs per block."""
_NUM_SAMPLED = 16_384
"""Number of examples whose lengths decide the default of ``max_examples``."""
_BLOCKS_KEPT = 3
"""Number of packed blocks that a rank keeps: reader threads may still read the block before the current one."""


class Lengths(Protocol):
    """The part of a data set that packing reads."""

    seq_len: int

    @property
    def num_rows(self) -> int: ...

    @property
    def num_pairs(self) -> int: ...

    def __len__(self) -> int: ...

    def lengths(self, ids: np.ndarray) -> np.ndarray: ...

    def length_sample(self, size: int) -> np.ndarray: ...


class _Block(NamedTuple):
    """The windows of a block, in the order in which they are trained; window w holds ids[starts[w] : starts[w + 1]].

    The first ``skipped[w]`` tokens of its first example are in the window before. The last example is cut where the
    window is full.
    """

    ids: np.ndarray
    starts: np.ndarray
    skipped: np.ndarray


class BlockOrder:
    """The order of all examples in a pass, in blocks.

    Args:
        num_examples: N.
        key: key of the order.
    """

    def __init__(self, num_examples: int, key: Key):
        self.num_examples, self._key = num_examples, derive_key(stream("order"), *key)
        self.num_runs = -(-num_examples // RUN)
        self.num_blocks = -(-self.num_runs // BLOCK_RUNS)

    def ids(self, block: int) -> np.ndarray:
        """int64 [n], the examples of a block, run after run."""
        slots = torch.arange(block * BLOCK_RUNS, min((block + 1) * BLOCK_RUNS, self.num_runs))
        runs = permute(slots, self.num_runs, self._key).numpy()
        ids = (runs[:, None] * RUN + np.arange(RUN)).reshape(-1)
        return ids[ids < self.num_examples]

    def shuffled(self, items: np.ndarray, block: int, name: str) -> np.ndarray:
        """``items`` of a block in a keyed order; ``name`` is part of the key: "examples" or "windows"."""
        if not len(items):
            return items
        key = derive_key(self._key, stream(f"packing/{name}"), block)
        return items[permute(torch.arange(len(items)), len(items), key).numpy()]


class PackedPass:
    """One pass over packed examples; used instead of :class:`~.order.Pass`.

    Args:
        packer: the packer of the run.
        selected: the selected ids.
        key: key of the order of this pass.
        windows_per_block: int64 [num_blocks].
        tokens_per_block: int64 [num_blocks], the tokens of the selected examples; None if nothing asks for them.
        num_batches: global batches of the pass; None for as many as its windows fill, at least 1. Windows that do not
            fill a batch are left out. If there are fewer windows than one batch, they repeat to fill it.
        round, weighted, strategy: as in :class:`~.order.Pass`.
    """

    def __init__(
        self,
        packer: "Packer",
        selected: SelectedSlots,
        key: Key,
        *,
        windows_per_block: np.ndarray,
        tokens_per_block: np.ndarray | None = None,
        num_batches: int | None = None,
        round: int = 0,
        weighted: bool = False,
        strategy: str = "uniform",
    ):
        self.packer, self.selected, self.order = packer, selected, key
        self.batch_size, self.round, self.weighted, self.strategy = packer.batch_size, round, weighted, strategy
        self.pool = Pool.whole(packer.num_examples)
        self._blocks = BlockOrder(packer.num_examples, key)
        self._first_window = np.concatenate(([0], np.cumsum(windows_per_block)))
        self.num_windows = int(self._first_window[-1])
        self._first_token = None if tokens_per_block is None else np.concatenate(([0], np.cumsum(tokens_per_block)))
        self.num_batches = max(1, self.num_windows // self.batch_size) if num_batches is None else num_batches
        self._packed: OrderedDict[int, _Block] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the slots of one row: the maximum number of examples in a window."""
        return (self.packer.max_examples,)

    @property
    def visit_key(self) -> tuple[int, ...]:
        """Integers that identify this pass within the run."""
        return (self.round, *self.order)

    def visit_key_of(self, batch: int) -> tuple[int, ...]:
        """The key of the visits in global batch ``batch``: that of the pass."""
        return self.visit_key

    def tokens_before(self, window: int) -> int:
        """The tokens in the windows before ``window``: exact where a block begins, else in proportion."""
        assert self._first_token is not None
        block = int(np.searchsorted(self._first_window, window, side="right")) - 1
        if block == len(self._first_window) - 1:
            return int(self._first_token[-1])
        first, num = int(self._first_window[block]), int(self._first_window[block + 1] - self._first_window[block])
        tokens = int(self._first_token[block + 1] - self._first_token[block])
        return int(self._first_token[block]) + (window - first) * tokens // num

    def ids(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """int64 [n, M], the examples of ``rows`` of each of the global batches [start, stop), padded with N."""
        return self._windows(start, stop, rows)[0]

    def skipped(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor | None:
        """int64 [n], how many tokens of the first example of each of these windows are in the window before.

        None if no window cuts an example.
        """
        return self._windows(start, stop, rows)[1] if self.packer.cuts_examples else None

    def _windows(self, start: int, stop: int, rows: slice) -> tuple[Tensor, Tensor]:
        windows = torch.arange(start * self.batch_size, stop * self.batch_size).view(-1, self.batch_size)
        return self.windows(windows[:, rows].flatten().numpy() % max(1, self.num_windows))

    def windows(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Numbers of windows, int64 [n] -> (:meth:`ids`, :meth:`skipped`) of these windows."""
        ids = np.full((len(numbers), self.packer.max_examples), self.packer.num_examples, dtype=np.int64)
        skipped = np.zeros(len(numbers), dtype=np.int64)
        blocks = np.searchsorted(self._first_window, numbers, side="right") - 1
        for row, (number, block) in enumerate(zip(numbers.tolist(), blocks.tolist(), strict=True)):
            packed = self._block(block)
            window = number - int(self._first_window[block])
            examples = packed.ids[packed.starts[window] : packed.starts[window + 1]]
            ids[row, : len(examples)] = examples
            skipped[row] = packed.skipped[window]
        return torch.from_numpy(ids), torch.from_numpy(skipped)

    def slots(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """int64 [n x M], the pool slots of :meth:`ids`, which equal the ids; 0 for padding."""
        ids = self.ids(start, stop, rows).flatten()
        return torch.where(ids < self.packer.num_examples, ids, 0)

    def _block(self, block: int) -> _Block:
        with self._lock:
            if block in self._packed:
                self._packed.move_to_end(block)
                return self._packed[block]
            # Inside the lock: the reader threads ask for one block at about the same time, and one of them packs it.
            ids, lengths = self.packer.selected_examples(self._blocks, block, self.selected)
            self._packed[block] = (
                self._concatenated(ids, lengths) if self.packer.cuts_examples else self._fitted(ids, lengths, block)
            )
            while len(self._packed) > _BLOCKS_KEPT:
                self._packed.popitem(last=False)
            return self._packed[block]

    def _fitted(self, ids: np.ndarray, lengths: np.ndarray, block: int) -> _Block:
        packed = best_fit(lengths, capacity=self.packer.capacity, max_examples=self.packer.max_examples)
        order = self._blocks.shuffled(np.arange(len(packed.starts) - 1), block, "windows")
        sizes = np.diff(packed.starts)[order]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        slots = packed.slots[np.repeat(packed.starts[:-1][order], sizes) + within]
        return _Block(ids[slots], starts, np.zeros(len(sizes), dtype=np.int64))

    def _concatenated(self, ids: np.ndarray, lengths: np.ndarray) -> _Block:
        limits = {"capacity": self.packer.capacity, "max_examples": self.packer.max_examples}
        packed = concatenate(lengths, **limits, keep_rest=True)
        return _Block(ids[packed.slots], packed.starts, packed.firsts[packed.starts[:-1]])


class Packer:
    """Makes the passes of a run over packed examples.

    Args:
        examples: the number and the lengths of the examples; a window is one row of this data set.
        batch_size: G, number of windows of a global batch.
        max_examples: the maximum number of examples in a window; 0 for :func:`default_limit`.
        packing: ``BEST_FIT``, or ``CONCATENATE`` for windows that may cut examples.
        rank, num_ranks: rank in the data-parallel group that shares the counting, and its size.
        add_up: an all-reduce SUM of an int64 tensor on the CPU over that group.
    """

    def __init__(
        self,
        examples: Lengths,
        *,
        batch_size: int,
        max_examples: int = 0,
        packing: str = BEST_FIT,
        rank: int = 0,
        num_ranks: int = 1,
        add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
    ):
        self.examples, self.batch_size = examples, batch_size
        self.num_examples, self.capacity = len(examples), examples.seq_len
        if packing not in PACKINGS:
            raise ValueError(f"packing = {packing!r} is unknown: use one of {', '.join(PACKINGS)}")
        self.cuts_examples = packing == CONCATENATE
        self.max_examples = max_examples or default_limit(examples, packing=packing)
        self.rank, self.num_ranks, self.add_up = rank, num_ranks, add_up
        if examples.num_rows < batch_size:
            raise ValueError(
                f"the data set fills {examples.num_rows} windows, fewer than one global batch of {batch_size}: write "
                "more data, or lower training.global_batch_size or training.seq_len"
            )

    @property
    def examples_per_batch(self) -> int:
        """The mean number of examples in a global batch of a full pass, at least 1."""
        return max(1, round(self.num_examples * self.batch_size / self.examples.num_rows))

    @property
    def num_tokens(self) -> int:
        """The sum of all lengths."""
        return self.examples.num_pairs

    @property
    def tokens_per_batch(self) -> int:
        """The mean number of tokens in a global batch of a full pass, at least 1 and at most all tokens."""
        return max(1, self.num_tokens * self.batch_size // self.examples.num_rows)

    def lengths_of(self, start: int, stop: int) -> Tensor:
        """int32 [stop - start], the lengths of the ids from ``start`` on; reads 4 bytes per document."""
        lengths = torch.empty(stop - start, dtype=torch.int32)
        for first in range(start, stop, RUN * BLOCK_RUNS):
            last = min(first + RUN * BLOCK_RUNS, stop)
            lengths[first - start : last - start] = torch.from_numpy(self.examples.lengths(np.arange(first, last)))
        return lengths

    def selected_examples(
        self, blocks: BlockOrder, block: int, selected: SelectedSlots
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, lengths), int64 [n] each: the selected examples of a block, shuffled."""
        ids = blocks.ids(block)
        ids = blocks.shuffled(ids[selected.contains(ids)], block, "examples")
        return ids, self.examples.lengths(ids)

    def full_pass(self, key: Key, *, round: int = 0, num_batches: int | None = None) -> PackedPass:
        """A pass over all examples. A collective."""
        return self.pack(SelectedSlots(self.num_examples), key, round=round, num_batches=num_batches)

    def pack(
        self,
        selected: SelectedSlots,
        key: Key,
        *,
        round: int = 0,
        weighted: bool = False,
        strategy: str = "uniform",
        num_batches: int | None = None,
        count_tokens: bool = False,
    ) -> PackedPass:
        """A pass over ``selected`` ids. A collective: the ranks share the counting of windows.

        Args:
            count_tokens: count the tokens of each block, too, for :meth:`PackedPass.tokens_before`.
        """
        blocks = BlockOrder(self.num_examples, key)
        num_blocks = blocks.num_blocks
        counts = torch.zeros(num_blocks * (1 + count_tokens), dtype=torch.int64)
        count = num_concatenated if self.cuts_examples else num_windows
        for block in range(self.rank, num_blocks, self.num_ranks):
            _, lengths = self.selected_examples(blocks, block, selected)
            counts[block] = count(lengths, capacity=self.capacity, max_examples=self.max_examples)
            if count_tokens:
                counts[num_blocks + block] = int(lengths.sum())
        totals = self.add_up(counts).numpy()
        return PackedPass(
            self,
            selected,
            key,
            windows_per_block=totals[:num_blocks],
            tokens_per_block=totals[num_blocks:] if count_tokens else None,
            num_batches=num_batches,
            round=round,
            weighted=weighted,
            strategy=strategy,
        )


def default_limit(examples: Lengths, *, packing: str = BEST_FIT) -> int:
    """The default of ``max_examples``: the smallest power of two that costs at most 1/256 more windows."""
    lengths = examples.length_sample(_NUM_SAMPLED)
    if packing == BEST_FIT:
        return window_limit(lengths, capacity=examples.seq_len)
    order = permute(torch.arange(len(lengths)), len(lengths), derive_key(stream("packing/sample"))).numpy()
    return window_limit(lengths[order], capacity=examples.seq_len, count=num_concatenated)
