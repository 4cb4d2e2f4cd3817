"""foundations/sharding.py against torch.chunk, DTensor, and numpy on the shards of all ranks."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_attent.data.plan.order import SelectedSlots
from titan_attent.foundations.counter_rng import derive_key, permute
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.selection import gather_bitmask

SIZES = (1, 2, 3, 4, 5, 7, 100, 101)


def sharding_of(num_examples: int, *, rank: int, size: int) -> ExampleSharding:
    """A rank's sharding with a plain object as mesh, without a process group."""
    mesh = SimpleNamespace(ndim=1, get_group=lambda: None, size=lambda: size, get_local_rank=lambda: rank)
    return ExampleSharding(num_examples, mesh=mesh)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 40))
def test_shards_are_those_of_torch_chunk(num_examples, size):
    expected = [part.tolist() for part in torch.arange(num_examples).chunk(size)]
    expected += [[]] * (size - len(expected))
    shardings = [sharding_of(num_examples, rank=rank, size=size) for rank in range(size)]
    assert [sharding.local_ids().tolist() for sharding in shardings] == expected
    assert [sharding.num_local for sharding in shardings] == [len(part) for part in expected]
    for sharding in shardings:
        assert [list(range(*sharding.range_of(rank))) for rank in range(size)] == expected


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.lists(st.integers(0, 59), max_size=20))
def test_an_id_has_an_index_on_its_owner_only(num_examples, size, ids):
    ids = [i % num_examples for i in ids]
    for rank in range(size):
        sharding = sharding_of(num_examples, rank=rank, size=size)
        owned = sharding.local_ids().tolist()
        index = sharding.local_index(torch.tensor(ids, dtype=torch.int64), elsewhere=-7)
        assert index.tolist() == [owned.index(i) if i in owned else -7 for i in ids]


def test_ids_beyond_24_and_32_bits():
    num_examples, size = 10**10 + 1, 16_384
    chunk = 610_352  # ceil of 10^10 + 1 over 16,384
    probes = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**32 - 1, 2**32, 2**32 + 1, 10**10 - 1, 10**10]
    stops = []
    for rank in range(size):
        sharding = sharding_of(num_examples, rank=rank, size=size)
        assert sharding.start == (stops[-1] if stops else 0)
        stops.append(sharding.stop)
        if any(sharding.start <= i < sharding.stop for i in probes):
            index = sharding.local_index(torch.tensor(probes), elsewhere=-1).tolist()
            assert index == [i - rank * chunk if i // chunk == rank else -1 for i in probes]
            ids = sharding.local_ids()
            assert ids.dtype == torch.int64 and ids[0] == rank * chunk and ids[-1] == sharding.stop - 1
    assert stops[-1] == num_examples and max(np.diff(stops)) == chunk
    # A permutation of all positions, selected from all examples, gives distinct ids.
    places = permute(torch.tensor(probes), num_examples, derive_key(1))
    ids = SelectedSlots(num_examples).select(places.numpy())
    assert len(set(ids.tolist())) == len(probes) and ids.max() < num_examples


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 700), st.integers(1, 70), st.integers(0, 2**32))
def test_a_gathered_bitmask_equals_packbits_of_all_choices(num_examples, size, seed):
    chosen = np.random.default_rng(seed).random(num_examples) < 0.5
    shardings = [sharding_of(num_examples, rank=rank, size=size) for rank in range(size)]
    parts = [torch.from_numpy(chosen[sharding.start : sharding.stop]) for sharding in shardings]
    segments: list[torch.Tensor] = []
    for sharding, part in zip(shardings, parts, strict=True):  # what each rank sends
        sharding.gather = lambda x: (segments.append(x), (x.expand(size, -1), None))[1]
        gather_bitmask(part, sharding=sharding)
    for sharding, part in zip(shardings[:2], parts[:2], strict=True):
        sharding.gather = lambda x: (torch.stack(segments), None)
        mask = gather_bitmask(part, sharding=sharding)
        np.testing.assert_array_equal(mask, np.packbits(chosen, bitorder="little"))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.sampled_from([1, 2, 10**7, 2**31]))
def test_totals_are_exact_where_64_bits_overflow(numbers, size):
    sharding = sharding_of(10**10, rank=0, size=size)
    sharding.sum = lambda x: x.mul_(size)  # as if every rank had the same numbers
    assert sharding.total(torch.tensor(numbers)) == [number * size for number in numbers]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_examples must be at least 1, not 0: give the data set's length"):
        ExampleSharding(0)
    with pytest.raises(ValueError, match="one dimension, not 2: pass torchtitan's `batch` mesh"):
        ExampleSharding(5, mesh=SimpleNamespace(ndim=2))


def collectives(mesh) -> list[dict]:
    results = []
    for num_examples in SIZES:
        sharding = ExampleSharding(num_examples, mesh=mesh)
        ids = sharding.local_ids()
        summed, largest = torch.tensor([sharding.rank + 2**40, -sharding.rank]), torch.tensor([-5.0 + sharding.rank])
        gathered, work = sharding.gather(torch.arange(6).view(2, 3).t() + 10 * sharding.rank)  # not contiguous
        late, handle = sharding.gather(ids.new_tensor([sharding.rank]), async_op=True)
        if handle is not None:
            handle.wait()
        shard = (ids * 3 + 1).float()
        whole = sharding.as_global(shard)
        shard += 1  # the global tensor shares the memory
        result = {
            "ids": ids.numpy(),
            "sum": sharding.sum(summed) is summed and summed.tolist(),
            "max": sharding.max(largest) is largest and largest.tolist(),
            "gathered": gathered.numpy(),
            "work": work,
            "late": late.flatten().tolist(),
            "whole": (whole.full_tensor() if isinstance(whole, DTensor) else whole).numpy(),
        }
        if mesh is not None:
            cut = distribute_tensor(torch.arange(num_examples), mesh).redistribute(placements=whole.placements)
            result["dtensor cut"] = cut.to_local().numpy()
        results.append(result)
    return results


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_collectives_and_the_shards_of_dtensor(num_ranks):
    ranks = run_on_ranks(collectives, num_ranks)
    for case, num_examples in enumerate(SIZES):
        results = [rank[case] for rank in ranks]
        np.testing.assert_array_equal(np.concatenate([result["ids"] for result in results]), np.arange(num_examples))
        for result in results:
            assert result["sum"] == [sum(range(num_ranks)) + num_ranks * 2**40, -sum(range(num_ranks))]
            assert result["max"] == [-5.0 + num_ranks - 1]
            parts = [np.arange(6).reshape(2, 3).T + 10 * rank for rank in range(num_ranks)]
            np.testing.assert_array_equal(result["gathered"], np.stack(parts))
            assert result["work"] is None and result["late"] == list(range(num_ranks))
            np.testing.assert_array_equal(result["whole"], np.arange(num_examples) * 3.0 + 2)
            if num_ranks > 1:
                np.testing.assert_array_equal(result["dtensor cut"], result["ids"])


def fail_on_the_last_rank(mesh) -> None:
    if mesh.get_local_rank() == mesh.size() - 1:
        raise ArithmeticError("the last rank's own words")
    torch.distributed.barrier()


def hang(mesh) -> None:
    if mesh.get_local_rank() == 0:
        time.sleep(60)
    torch.distributed.barrier()


def test_the_spawn_helper_names_the_failed_rank_and_kills_a_world_that_hangs():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed:.*ArithmeticError: the last rank's own words"):
        run_on_ranks(fail_on_the_last_rank, 2)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 were still running"):
        run_on_ranks(hang, 2, timeout=2.0)
    assert time.monotonic() - start < 30
