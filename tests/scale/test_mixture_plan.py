"""A mixture of 10^10 examples on 512 ranks: a rank evaluates the orders of its own rows only, and holds and saves a few
numbers per source."""

import json
import tracemalloc
from itertools import islice
from typing import Any
from unittest import mock

import pytest
import torch
from test_step import Counted

from titan_attent import TeachingSampler
from titan_attent.data.plan import mixture as mixture_module
from titan_attent.data.plan import source as source_module
from titan_attent.data.plan.mixture import STRETCH, Mixture, Source
from titan_attent.data.plan.proportions import Point, Proportions
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.data.plan.source import Span

BATCH, STEPS, RANKS = 4096, 3, 512
NAMES, SHARES = ("web", "code", "books", "forum"), (0.5, 0.3, 0.15, 0.05)


def build(num_examples: int, *, num_ranks: int = RANKS) -> TeachingSampler:
    ends = [0, num_examples // 2, num_examples // 4 * 3, num_examples // 8 * 7, num_examples]
    sources = [Source(name, (Span(a, b),), b - a) for name, a, b in zip(NAMES, ends, ends[1:], strict=False)]
    proportions = Proportions(NAMES, tuple((Point(0, share),) for share in SHARES))
    mixture = Mixture(sources, proportions, num_examples=num_examples, batch_size=BATCH, seq_len=1024, seed=1)
    plan = Shuffled(num_examples, batch_size=BATCH, seed=1)
    return TeachingSampler(plan, rank=num_ranks // 2, num_ranks=num_ranks, mixture=mixture)


def trained(num_examples: int) -> tuple[int, Counted, list[int], str]:
    """As one rank of 512: bytes held, counted calls, the sizes of all evaluated orders, the saved state."""
    evaluated: list[int] = []

    def permute(positions: torch.Tensor, size: int, key: int) -> torch.Tensor:
        evaluated.append(len(positions))
        return real(positions, size, key)

    real: Any = source_module.permute
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    with (
        Counted().counting() as seen,
        mock.patch.object(source_module, "permute", permute),
        mock.patch.object(mixture_module, "permute", permute),
    ):
        sampler = build(num_examples)
        for _ in islice(sampler, STEPS):
            pass
        state = sampler.state_dict()["mixture"]
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held, seen, evaluated, state


@pytest.fixture(scope="module")
def runs() -> dict[int, tuple[int, Counted, list[int], str]]:
    trained(10**6)  # allocations of the first call that stay
    return {num: trained(num) for num in (10**6, 10**10)}


def test_a_rank_evaluates_the_orders_of_its_own_rows(runs: dict[int, Any]) -> None:
    for _, _, evaluated, _ in runs.values():
        own = BATCH // RANKS
        assert max(evaluated) <= own and sum(evaluated) == STEPS * own * 2  # the place in the batch, and in the source


def test_nothing_per_example_is_held_sent_or_saved(runs: dict[int, Any]) -> None:
    (small, _, _, _), (large, seen, _, state) = runs.values()
    assert large < small + 20_000 and large < 4_000 * STRETCH
    assert seen.collectives == 0 and seen.received == 0
    assert len(state) < 200 * len(NAMES)
    assert {len(numbers) for numbers in json.loads(state).values()} == {6}


def test_the_ids_are_those_of_one_rank() -> None:
    (ids, _), (whole, _) = next(iter(build(10**10))), next(iter(build(10**10, num_ranks=1)))
    assert torch.equal(ids, whole[2048:2056]) and int(whole.max()) > 2**32
