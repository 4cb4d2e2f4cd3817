"""A step, an exchange and a checkpoint on one of up to 4,096 ranks: counts that must not grow with the number of ranks.

torch's "fake" process group replaces the other ranks: its collectives return the right shapes without communication.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from paper import paper_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import titan_attent.data.plan.order
from titan_attent import LossBuffer, Teacher, TeachingSampler
from titan_attent.foundations.sharding import ExampleSharding

RANKS = (64, 512, 4096)
EXAMPLES_PER_RANK = 1000
GLOBAL_BATCH = 8192
NUM_EXAMPLES_AT_SCALE = 10**10


@contextmanager
def synthetic_world(num_ranks: int) -> Iterator[Any]:
    """The mesh of a process group in which this process is the middle rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=num_ranks // 2, world_size=num_ranks)
    try:
        yield init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("batch",))
    finally:
        dist.destroy_process_group()


class Counted(TorchDispatchMode):
    """Counts of operators, collectives, and bytes that the rank receives."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.collectives, self.received = Counter[str](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self) -> Iterator["Counted"]:
        gather, reduce = ExampleSharding.gather, ExampleSharding.sum

        def gathered(sharding: Any, x: torch.Tensor, **more: Any) -> Any:
            self.collectives += 1
            self.received += x.nbytes * sharding.size
            return gather(sharding, x, **more)

        def reduced(sharding: Any, x: torch.Tensor) -> Any:
            self.collectives += 1
            self.received += 2 * x.nbytes
            return reduce(sharding, x)

        patches = mock.patch.multiple(ExampleSharding, gather=gathered, sum=reduced)
        with patches, self:
            yield self


def teacher_of(mesh: Any, num_ranks: int) -> tuple[Teacher, TeachingSampler]:
    buffer = LossBuffer(EXAMPLES_PER_RANK * num_ranks, mesh=mesh)
    config = paper_config(strategy="hard", quarantine_after=8)
    teacher = Teacher(buffer, config, batch_size=GLOBAL_BATCH, total_steps=10_000)
    return teacher, TeachingSampler(teacher, rank=num_ranks // 2, num_ranks=num_ranks)


def exchange(num_ranks: int) -> Counted:
    """The counts of sixteen steps of one pass and of their exchange, until the losses are in the buffer."""
    with synthetic_world(num_ranks) as mesh:
        teacher, sampler = teacher_of(mesh, num_ranks)
        teacher.next_pass(step=0)
        ids = torch.arange(GLOBAL_BATCH // num_ranks)
        with Counted().counting() as seen:
            for step in range(1, 17):
                teacher.buffer.record(ids, torch.ones(len(ids)), step=step)
                teacher.step_done()
            teacher.buffer.sync()
        assert int(teacher.buffer.agreement._differed_in) == -1 and sampler.rank == num_ranks // 2
        return seen


@pytest.fixture(scope="module")
def exchanges() -> dict[int, Counted]:
    return {num_ranks: exchange(num_ranks) for num_ranks in RANKS}


def test_an_exchange_takes_as_many_operations_on_4096_ranks_as_on_64(exchanges: dict[int, Counted]) -> None:
    first, *others = exchanges.values()
    assert all(other.operators == first.operators for other in others)
    assert sum(first.operators.values()) < 16 * 12 + 80


def test_an_exchange_is_one_collective_of_the_records_and_one_hash_per_rank(exchanges: dict[int, Counted]) -> None:
    for num_ranks, seen in exchanges.items():
        assert seen.collectives == 1
        assert seen.received == 16 * (GLOBAL_BATCH * 16 + num_ranks)  # two int64 per record, and a column of hashes


def test_an_exchange_has_no_host_sync(exchanges: dict[int, Counted]) -> None:
    for seen in exchanges.values():
        waits = {
            name for name in seen.operators if any(word in name for word in ("local_scalar", "nonzero", "lift_fresh"))
        }
        assert not waits


def checkpoint(num_ranks: int) -> tuple[Counted, dict[str, Any]]:
    with synthetic_world(num_ranks) as mesh:
        teacher, sampler = teacher_of(mesh, num_ranks)
        teacher.next_pass(step=0)
        with Counted().counting() as seen:
            state = {"teacher": teacher.state_dict(), "dataloader": sampler.state_dict()}
        return seen, dict(leaves(state))


def leaves(state: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            # While the process group exists: the size of this rank's shard.
            yield f"{path}{name}", (value.shape, value.to_local().nbytes) if isinstance(value, DTensor) else value


def test_a_checkpoint_has_36_bytes_per_example_sharded_over_the_ranks() -> None:
    operators = []
    for num_ranks in RANKS:
        seen, state = checkpoint(num_ranks)
        cut = {name: value for name, value in state.items() if isinstance(value, tuple)}
        assert all(shape == (EXAMPLES_PER_RANK * num_ranks,) for shape, _ in cut.values())
        # Buffer 20 bytes, weight and last draw 8, quarantine 8.
        assert sum(num_bytes for _, num_bytes in cut.values()) == 36 * EXAMPLES_PER_RANK
        whole = [value for name, value in state.items() if name not in cut]
        assert sum(value.nbytes if isinstance(value, torch.Tensor) else len(str(value)) for value in whole) < 5000
        assert seen.collectives == 0  # nothing was pending
        operators.append(seen.operators)
    assert operators[0] == operators[1] == operators[2]


def test_a_rank_evaluates_the_order_of_its_own_rows_only() -> None:
    for num_ranks in RANKS:
        evaluated, permute = [], titan_attent.data.plan.order.permute

        def counted(positions: torch.Tensor, size: int, key: int, evaluated=evaluated, permute=permute) -> torch.Tensor:
            evaluated.append(positions.numel())
            return permute(positions, size, key)

        buffer = LossBuffer(10**6)
        teacher = Teacher(buffer, paper_config(), batch_size=GLOBAL_BATCH, total_steps=10_000)
        sampler = TeachingSampler(teacher, rank=num_ranks - 1, num_ranks=num_ranks, microbatches=2)
        current = sampler.current_pass()
        with mock.patch.object(titan_attent.data.plan.order, "permute", counted):
            for batch, microbatch in ((0, 0), (0, 1), (1, 0)):
                sampler.local_ids(current, batch, microbatch)
        assert sum(evaluated) == 3 * GLOBAL_BATCH // num_ranks // 2


def test_ten_billion_examples_are_sharded_exactly() -> None:
    """10^10 examples on 4,096 ranks: every rank owns a 4,096th of them, rounded up."""
    with synthetic_world(4096) as mesh:
        sharding = ExampleSharding(NUM_EXAMPLES_AT_SCALE, mesh=mesh)
        assert sharding.num_local == -(-NUM_EXAMPLES_AT_SCALE // 4096) == 2_441_407
        assert sharding.start == 2048 * 2_441_407 > 2**32
        last = sharding.range_of(4095)
        assert last[1] == NUM_EXAMPLES_AT_SCALE and 0 < last[1] - last[0] <= 2_441_407
