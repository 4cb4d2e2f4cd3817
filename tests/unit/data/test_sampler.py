"""sampler.py against sorted lists of ids, for any number of ranks and microbatches, and beyond 2^32 ids."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from titan_attent.data.plan.order import OrderCursor, Pass, Pool, SelectedSlots
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.foundations.counter_rng import derive_key, permute, stream


def selected_ids(mask: np.ndarray) -> SelectedSlots:
    return SelectedSlots(len(mask), bitmask=np.packbits(mask, bitorder="little"))


@settings(deadline=None)
@given(hnp.arrays(bool, st.integers(1, 2000)), st.randoms(use_true_random=False))
def test_select_is_the_jth_smallest_id(mask, random):
    ids, expected = selected_ids(mask), np.flatnonzero(mask)
    assert len(ids) == len(expected)
    ranks = np.arange(len(expected))
    random.shuffle(ranks)
    np.testing.assert_array_equal(ids.select(ranks), expected[ranks])


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("num_examples", [511, 512, 513, 100_003])
def test_select_across_blocks(num_examples, share):
    mask = np.random.default_rng(num_examples).random(num_examples) < share
    mask[[0, -1]] = True
    expected = np.flatnonzero(mask)
    np.testing.assert_array_equal(selected_ids(mask).select(np.arange(len(expected))), expected)


def test_select_skips_empty_blocks():
    mask = np.zeros(5000, dtype=bool)
    mask[[3, 2047, 2048, 4999]] = True
    np.testing.assert_array_equal(selected_ids(mask).select(np.array([3, 0, 2, 1, 1])), [4999, 3, 2048, 2047, 2047])


def test_everything_is_selected_without_a_bitmask_however_large():
    ids = SelectedSlots(10**10)
    slots = np.array([0, 2**24 + 1, 2**32 + 1, 10**10 - 1])
    assert len(ids) == 10**10
    np.testing.assert_array_equal(ids.select(slots), slots)


def test_a_full_pass_beyond_the_32_bit_ids():
    num_examples, batch = 10**10, 1000
    everything = Pool(num_examples, order=(1, 0, 0), size=num_examples)
    full = Pass(everything, SelectedSlots(num_examples), order=None, batch_size=batch, num_batches=10**7)
    positions = list(range(batch)) + list(range(num_examples - batch, num_examples))
    ids = torch.cat((full.ids(0, 1), full.ids(10**7 - 1, 10**7)))
    assert ids.dtype == torch.int64 and len(ids.unique()) == 2 * batch
    assert ids.min() >= 0 and 2**32 < ids.max() < num_examples
    key = derive_key(stream("order"), 1, 0, 0)
    assert torch.equal(ids, permute(torch.tensor(positions), num_examples, key))


def some_pass(*, index: int = 0, round: int = 2, seed: int = 5) -> Pass:
    """11 batches of 12 out of 135 ids; the passes of odd index are weighted."""
    selected = selected_ids(np.arange(203) % 3 > 0)
    return Pass(
        Pool.whole(203), selected, order=(seed, round, index), batch_size=12, num_batches=11, weighted=index % 2 == 1
    )


def plain_weights(ids: torch.Tensor) -> torch.Tensor:
    return ids.float() / 100


def test_a_pass_trains_every_full_batch_of_its_selection_once():
    one = some_pass()
    ids = one.ids(0, one.num_batches)
    selected = [i for i in range(203) if i % 3]
    assert len(ids) == 132 == len(set(ids.tolist()))
    assert set(ids.tolist()) <= set(selected) and len(selected) == 135
    batches = [one.ids(b, b + 1) for b in range(one.num_batches)]
    assert torch.equal(torch.cat(batches), ids)


@pytest.mark.parametrize("other", [{"index": 1}, {"round": 3}, {"seed": 6}])
def test_seed_round_and_index_each_give_another_order(other):
    one, two = some_pass(), some_pass(**other)
    same = (one.ids(0, 11) == two.ids(0, 11)).float().mean()
    assert same < 0.1
    # The left out examples differ as well: no example is missing in every pass.
    assert set(one.ids(0, 11).tolist()) != set(two.ids(0, 11).tolist())


def plain_order(num_examples: int, number: int) -> list[int]:
    return permute(torch.arange(num_examples), num_examples, derive_key(stream("order"), 5, 0, number)).tolist()


@pytest.mark.parametrize(
    "sizes", [(203,), (50, 50, 50, 50, 50), (50, 100, 60, 203, 1, 202), (100, None, 100, None, None)]
)
def test_spans_follow_each_other_through_the_orders(sizes):
    cursor, order, start = OrderCursor(203, 5), 0, 0
    for size in sizes:
        if 203 - start < (size or 12):
            order, start = order + 1, 0
        stop = start + size if size else 203
        cursor.take(size, at_least=12)
        pool = cursor.pool()
        assert pool.ids(torch.arange(pool.size)).tolist() == plain_order(203, order)[start:stop]
        start = stop


def test_a_pass_over_a_pool_trains_the_selected_slots_of_the_span():
    mask = np.arange(60) % 4 > 0
    pool = Pool(203, order=(5, 0, 3), start=70, size=60)
    one = Pass(pool, selected_ids(mask), order=(5, 2, 0), batch_size=12, num_batches=3)
    span = plain_order(203, 3)[70:130]
    slots = one.slots(0, 3)
    assert len(set(slots.tolist())) == 36 and mask[slots].all()
    assert one.ids(0, 3).tolist() == [span[slot] for slot in slots]
    assert slots.tolist() != sorted(slots.tolist())


class PassList:
    """A stand-in for the teacher: gives fixed passes, records the requests, and weighs an example by its id."""

    batch_size = 12

    def __init__(self):
        self.weights_every = 4
        self.round, self.pass_index = 2, 0
        self.current: Pass | None = None
        self.requests: list[int] = []
        self.weighed: list[int] = []
        self.num_served = 0

    def current_pass(self) -> Pass | None:
        return self.current

    def resume(self, *, round: int, pass_index: int, step: int) -> bool:
        return True

    def follow_plan(self, *, step: int, consumed: int) -> None:
        """The plan is the same."""

    def next_pass(self, *, step: int) -> Pass:
        self.pass_index = len(self.requests)
        self.requests.append(step)
        self.current = some_pass(index=self.pass_index)
        return self.current

    def weights_of(self, slots: torch.Tensor) -> torch.Tensor:
        self.weighed.append(len(slots))
        return plain_weights(slots)

    def batch_served(self) -> None:
        self.num_served += 1


def take(sampler: TeachingSampler, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and weights [num, batch_size] of the next microbatches."""
    ids, weights = zip(*itertools.islice(iter(sampler), num), strict=True)
    return torch.stack(ids), torch.stack(weights)


@pytest.mark.parametrize("num_ranks, microbatches", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (3, 4), (12, 1), (1, 12)])
def test_ranks_and_microbatches_cut_the_same_global_order(num_ranks, microbatches):
    expected = torch.cat([some_pass(index=i).ids(0, 11) for i in range(2)]).view(22, 12)
    blocks = []
    for rank in range(num_ranks):
        teacher = PassList()
        sampler = TeachingSampler(teacher, rank=rank, num_ranks=num_ranks, microbatches=microbatches)
        ids, weights = take(sampler, 22 * microbatches)
        assert ids.shape[1] == weights.shape[1] == 12 // num_ranks // microbatches
        assert teacher.requests == [0, 11] and sampler.step == 22 == teacher.num_served and sampler.consumed == 11
        # The first pass is not weighted; the weights of the second come in blocks of weights_every batches.
        first, second = ids.view(22, -1)[:11], ids.view(22, -1)[11:]
        assert torch.equal(weights.view(22, -1), torch.cat((torch.ones(first.shape), plain_weights(second))))
        assert [n * num_ranks for n in teacher.weighed] == [4 * 12, 4 * 12, 3 * 12]
        blocks.append(ids.view(22, -1))
    assert torch.equal(torch.cat(blocks, dim=1), expected)


def test_local_rows_tile_the_global_batch():
    samplers = [TeachingSampler(PassList(), rank=rank, num_ranks=2, microbatches=3) for rank in range(2)]
    assert [i for sampler in samplers for i in range(12)[sampler.local_rows()]] == list(range(12))


@pytest.mark.parametrize("cut", [0, 1, 10, 11, 12, 21])
def test_state_resumes_at_another_number_of_ranks(cut):
    teacher = PassList()
    before = TeachingSampler(teacher, num_ranks=3, microbatches=2)
    if cut:
        take(before, 2 * cut)
    state = before.state_dict()
    assert all(isinstance(value, int) for value in state.values())
    after = TeachingSampler(teacher, num_ranks=1)
    after.load_state_dict(state)
    expected = torch.cat([some_pass(index=i).ids(0, 11) for i in range(3)]).view(33, 12)
    ids, weights = take(after, 30 - cut)
    assert torch.equal(ids, expected[cut:30])
    second = slice(max(0, 11 - cut), 22 - cut)
    assert torch.equal(weights[second], plain_weights(ids[second]))


@pytest.mark.parametrize("num_ranks, microbatches", [(5, 1), (1, 8), (2, 4), (24, 1)])
def test_a_batch_that_does_not_split_is_refused(num_ranks, microbatches):
    message = (
        rf"batch of 12 .* {num_ranks} ranks x {microbatches} microbatches: .*multiple of {num_ranks * microbatches}"
    )
    with pytest.raises(ValueError, match=message):
        TeachingSampler(PassList(), num_ranks=num_ranks, microbatches=microbatches)
