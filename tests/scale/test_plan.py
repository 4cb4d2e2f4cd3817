"""A run without selection keeps, sends and saves nothing per example, for any number of examples."""

import tracemalloc
from itertools import islice

import pytest
import torch
from test_step import Counted, leaves

from titan_attent import TeachingSampler
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.foundations.ledger import Ledger
from titan_attent.job_config import JobConfig
from titan_attent.systems.system_list import systems_on
from titan_attent.systems.teaching.config import TeacherConfig

BATCH, STEPS = 512, 3


def trained(num_examples: int) -> tuple[int, Counted, int]:
    """Run steps as one rank of 512: the most bytes of memory held, counted calls, and leaves of a checkpoint."""
    ledger = Ledger(batch_size=BATCH, tokens_per_example=1024, accounts=())
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    with Counted().counting() as seen:
        plan = Shuffled(num_examples, batch_size=BATCH, seed=0, ledger=ledger)
        sampler = TeachingSampler(plan, rank=256, num_ranks=512)
        for _ in islice(sampler, STEPS):
            pass
        state = dict(leaves({"dataloader": sampler.state_dict(), "ledger": ledger.state_dict()}))
    held = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert all(isinstance(value, (int, float)) for value in state.values())
    return held, seen, len(state)


@pytest.fixture(scope="module")
def runs() -> dict[int, tuple[int, Counted, int]]:
    trained(10**4)  # imports and allocations of the first call
    return {num: trained(num) for num in (10**4, 10**7, 10**10)}


def test_nothing_per_example_is_held(runs: dict[int, tuple[int, Counted, int]]) -> None:
    smallest, _, largest = (held for held, _, _ in runs.values())
    assert largest < smallest + 20_000  # for 10^10 examples, whose losses would be 360 GB


def test_nothing_is_exchanged(runs: dict[int, tuple[int, Counted, int]]) -> None:
    assert all(seen.collectives == 0 and seen.received == 0 for _, seen, _ in runs.values())


def test_a_checkpoint_is_a_few_numbers(runs: dict[int, tuple[int, Counted, int]]) -> None:
    assert {num_leaves for _, _, num_leaves in runs.values()} == {4 + 4 + 4}


def test_a_uniform_run_has_no_system() -> None:
    sections = JobConfig()
    assert systems_on(sections) == []
    sections.teacher = TeacherConfig(strategy="hard")
    assert [system.name for system, _ in systems_on(sections)] == ["teacher"]


def test_the_order_is_evaluated_only_where_it_is_read() -> None:
    """The ids of one rank's block of a batch, without the ids of the other ranks."""
    plan = Shuffled(10**10, batch_size=BATCH, seed=3)
    ids = plan.next_pass(step=0).ids(5, 6, slice(256, 257))
    assert ids.shape == (1,) and ids.dtype == torch.int64 and 0 <= int(ids) < 10**10
