"""packed.py: passes over packed examples, against plain loops: the same windows on any number of ranks, none lost."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_attent.data.plan.order import SelectedSlots
from titan_attent.data.plan.packed import BLOCK_RUNS, CONCATENATE, RUN, BlockOrder, PackedPass, Packer
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
    def num_pairs(self) -> int:
        return int(self.all.sum())

    @property
    def num_rows(self) -> int:
        return -(-self.num_pairs // CAPACITY)

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
    blocks, rows, chosen = BlockOrder(num, key), [], set(expected.tolist())
    for block in range(blocks.num_blocks):
        ids = np.array([i for i in blocks.ids(block).tolist() if i in chosen]) if block == 0 else None
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


def tokens_of(one: PackedPass, examples: Examples, rows: Tensor, skipped: Tensor) -> list[list[tuple[int, int]]]:
    """(example, token in it) of every token of each row: a row is full, or ends with its last example."""
    windows = []
    for ids, skip in zip(rows.tolist(), skipped.tolist(), strict=True):
        window = [(i, token) for i in ids if i < len(examples) for token in range(int(examples.all[i]))][skip:]
        windows.append(window[:CAPACITY])
    return windows


@pytest.mark.parametrize(
    ("num", "share", "limit"), [(3000, 1.0, 0), (3000, 0.37, 0), (150_000, 0.9, 0), (40, 1.0, 0), (3000, 0.6, 3)]
)
def test_concatenated_windows_train_every_token_once(num: int, share: float, limit: int) -> None:
    """The selected examples of each block, joined in its shuffled order and cut every 64 tokens."""
    examples = Examples(num)
    selected, chosen = selection(num, share)
    packer, key = Packer(examples, batch_size=1, packing=CONCATENATE, max_examples=limit), (7, 1, 0)
    one = packer.pack(selected, key)
    rows, skipped = one.ids(0, one.num_batches), one.skipped(0, one.num_batches)
    assert skipped is not None and rows.shape == (one.num_windows, packer.max_examples)
    windows = tokens_of(one, examples, rows, skipped)
    expected = sorted((i, token) for i in chosen.tolist() for token in range(int(examples.all[i])))
    assert sorted(token for window in windows for token in window) == expected
    assert sum(bool(skip) for skip in skipped.tolist()) > 0.5 * len(windows) or limit
    # In order, block after block.
    blocks = BlockOrder(num, key)
    stream = [
        (i, token)
        for block in range(blocks.num_blocks)
        for i in packer.selected_examples(blocks, block, selected)[0].tolist()
        for token in range(int(examples.all[i]))
    ]
    assert [token for window in windows for token in window] == stream
    if not limit and num * share > 2000:  # the last window of a block, and a few that hold many examples
        assert len(windows) <= 1.02 * (len(stream) / CAPACITY + blocks.num_blocks)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_concatenated_windows_are_the_same_on_any_number_of_ranks_and_from_any_batch(num_ranks: int) -> None:
    num = 140_000
    selected, _ = selection(num, 0.6)
    given = {"batch_size": 30, "packing": CONCATENATE}
    alone = Packer(Examples(num), **given).pack(selected, (0, 1, 0))
    parts: list[Tensor] = []
    for rank in range(num_ranks):
        add_up = parts.append  # returns None: the sum is made below
        place = {"rank": rank, "num_ranks": num_ranks, "add_up": lambda x, add_up=add_up: (add_up(x.clone()), x)[1]}
        Packer(Examples(num), **given, **place).pack(selected, (0, 1, 0))
    counts = torch.stack(parts).sum(0)
    width = 30 // num_ranks
    batch = alone.num_batches - 2
    whole = alone.ids(batch, batch + 1), alone.skipped(batch, batch + 1)
    for rank in range(num_ranks):
        # Another process that begins at this batch, with nothing but the key, the selection and the counts.
        other = PackedPass(Packer(Examples(num), **given), selected, (0, 1, 0), windows_per_block=counts.numpy())
        assert (other.num_windows, other.num_batches) == (alone.num_windows, alone.num_batches)
        rows = slice(rank * width, (rank + 1) * width)
        assert torch.equal(other.ids(batch, batch + 1, rows), whole[0][rows])
        skipped, expected = other.skipped(batch, batch + 1, rows), whole[1]
        assert skipped is not None and expected is not None and torch.equal(skipped, expected[rows])


def test_best_fit_skips_nothing_and_unknown_packings_are_refused() -> None:
    packer = Packer(Examples(500), batch_size=2)
    assert packer.full_pass((0, 0, 0)).skipped(0, 1) is None
    with pytest.raises(ValueError, match="packing = 'first_fit' is unknown: use one of best_fit, concatenate"):
        Packer(Examples(500), batch_size=2, packing="first_fit")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_lengths_of_a_shard_are_read_in_blocks(ranks: int) -> None:
    examples = Examples(150_000)
    packer = Packer(examples, batch_size=2)
    parts = [packer.lengths_of(150_000 * r // ranks, 150_000 * (r + 1) // ranks) for r in range(ranks)]
    assert torch.equal(torch.cat(parts), torch.from_numpy(examples.all).int())
    assert max(map(len, examples.asked)) <= RUN * BLOCK_RUNS and packer.num_tokens == examples.all.sum()
    assert packer.tokens_per_batch == 2 * packer.num_tokens // examples.num_rows
