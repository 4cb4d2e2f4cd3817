"""packed.py: passes over packed examples, against plain loops: the same windows on any number of ranks, none lost."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_attent.data.plan.order import SelectedSlots
from titan_attent.data.plan.packed import BLOCK_RUNS, RUN, BlockOrder, Packer
from titan_attent.data.plan.packing import best_fit

CAPACITY = 64


class Examples:
    """Lengths by a formula, so that any id has one."""

    seq_len = CAPACITY

    def __init__(self, num: int):
        rng = np.random.default_rng(num)
        self.all = np.minimum(CAPACITY, 1 + rng.geometric(0.06, num)).astype(np.int64)
        self.asked: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.all)

    @property
    def num_rows(self) -> int:
        return -(-int(self.all.sum()) // CAPACITY)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        self.asked.append(ids)
        return self.all[ids]

    def length_sample(self, size: int) -> np.ndarray:
        return self.all[:size]


def selection(num: int, share: float, seed: int = 0) -> tuple[SelectedSlots, np.ndarray]:
    chosen = np.random.default_rng(seed).random(num) < share
    return SelectedSlots(num, bitmask=np.packbits(chosen, bitorder="little")), np.flatnonzero(chosen)


@pytest.mark.parametrize("num", [1, 255, 256, 257, 70_000, 3 * RUN * BLOCK_RUNS + 5])
def test_every_example_is_in_one_block_and_runs_stay_together(num: int) -> None:
    blocks = BlockOrder(num, (1, 2, 3))
    found = [blocks.ids(block) for block in range(blocks.num_blocks)]
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(num))
    for ids in found:
        starts = np.flatnonzero(np.diff(ids) != 1) + 1
        assert all(ids[start] % RUN == 0 for start in (0, *starts))
    if num > 5 * RUN:
        assert not np.array_equal(np.concatenate(found), np.arange(num)), "the runs are shuffled"


@pytest.mark.parametrize(("num", "share"), [(3000, 1.0), (3000, 0.37), (150_000, 0.9), (150_000, 0.02), (40, 1.0)])
def test_a_pass_trains_every_selected_example_once(num: int, share: float) -> None:
    examples = Examples(num)
    selected, expected = selection(num, share)
    packer = Packer(examples, batch_size=1)
    one = packer.pack(selected, (7, 1, 0))
    rows = one.ids(0, one.num_batches).numpy()
    assert rows.shape == (one.num_windows, packer.max_examples) and one.num_batches == one.num_windows
    assert np.array_equal(np.sort(rows[rows < num]), expected)
    lengths = np.append(examples.all, 0)
    fill = lengths[rows].sum(axis=1)
    assert fill.max() <= CAPACITY
    if num * share > 2000:
        assert fill.sum() > 0.99 * CAPACITY * one.num_windows
    # Real ids come first in a row, padding behind them.
    assert (np.diff((rows == num).astype(int), axis=1) >= 0).all()


def test_windows_are_those_of_a_plain_loop() -> None:
    """Block by block: the selected ids in the block's order, packed, windows in the block's order."""
    num = 150_000
    examples = Examples(num)
    selected, expected = selection(num, 0.5)
    packer, key = Packer(examples, batch_size=1), (3, 2, 1)
    blocks, rows = BlockOrder(num, key), []
    for block in range(blocks.num_blocks):
        ids = np.array([i for i in blocks.ids(block).tolist() if i in set(expected.tolist())]) if block == 0 else None
        if ids is None:
            ids = blocks.ids(block)
            ids = ids[np.isin(ids, expected)]
        ids = blocks.shuffled(ids, block, "examples")
        packed = best_fit(examples.all[ids], capacity=CAPACITY, max_examples=packer.max_examples)
        windows = [ids[packed.slots[a:b]] for a, b in zip(packed.starts[:-1], packed.starts[1:], strict=True)]
        rows += [windows[i] for i in blocks.shuffled(np.arange(len(windows)), block, "windows")]
    one = packer.pack(selected, key)
    got = one.ids(0, one.num_batches).numpy()
    assert len(rows) == one.num_windows
    for row, window in zip(got, rows, strict=True):
        assert np.array_equal(row[row < num], window)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_ranks_count_a_share_each_and_find_the_same_windows(num_ranks: int) -> None:
    num = 200_000
    selected, _ = selection(num, 0.6)
    alone = Packer(Examples(num), batch_size=30).pack(selected, (0, 1, 0))
    parts: list[Tensor] = []

    def noted(rank: int) -> Callable[[Tensor], Tensor]:
        return lambda counts: (parts.append(counts.clone()), counts)[1]

    examples = [Examples(num) for _ in range(num_ranks)]
    for rank in range(num_ranks):
        given = {"rank": rank, "num_ranks": num_ranks, "add_up": noted(rank)}
        Packer(examples[rank], batch_size=30, **given).pack(selected, (0, 1, 0))
    assert torch.equal(torch.stack(parts).sum(0), torch.from_numpy(np.diff(alone._first_window)))
    read = [sum(map(len, one.asked)) for one in examples]
    assert sum(read) == len(selected) and max(read) <= len(selected) / num_ranks + RUN * BLOCK_RUNS
    rows = alone.ids(3, 6)
    width = 30 // num_ranks
    if 30 % num_ranks == 0:
        shares = [alone.ids(3, 6, slice(r * width, (r + 1) * width)).view(3, width, -1) for r in range(num_ranks)]
        assert torch.equal(torch.cat(shares, dim=1).flatten(0, 1), rows)


def test_another_key_is_another_order_and_the_same_key_the_same() -> None:
    packer = Packer(Examples(5000), batch_size=4)
    first, again, other = (packer.full_pass((0, 0, i)).ids(0, 5) for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_fewer_windows_than_a_batch_come_again() -> None:
    num = 3000
    examples = Examples(num)
    selected, chosen = selection(num, 0.004)
    one = Packer(examples, batch_size=50).pack(selected, (0, 1, 0))
    assert one.num_windows < 50 and one.num_batches == 1
    rows = one.ids(0, 1)
    assert len(rows) == 50 and torch.equal(rows[: 50 - one.num_windows], rows[one.num_windows :])
    assert set(rows[rows < num].tolist()) == set(chosen.tolist())


def test_slots_beside_ids() -> None:
    packer = Packer(Examples(3000), batch_size=6)
    one = packer.full_pass((0, 0, 0))
    ids, slots = one.ids(2, 4, slice(1, 3)), one.slots(2, 4, slice(1, 3))
    assert ids.shape == (4, packer.max_examples) and slots.shape == (4 * packer.max_examples,)
    real = ids.flatten() < 3000
    assert torch.equal(slots[real], ids.flatten()[real]) and (slots[~real] == 0).all()


def test_data_that_fill_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="fills 5 windows, fewer than one global batch of 6: write more data"):
        examples = Examples(20)
        examples.all[:] = 16
        Packer(examples, batch_size=6)
