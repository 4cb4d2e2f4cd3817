"""shuffled.py against the full passes of a teacher, and against itself after a resume."""

from itertools import islice

import pytest
import torch
from paper import paper_config

from titan_attent import LossBuffer, Teacher, TeachingSampler
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.foundations.ledger import Ledger

NUM, BATCH, SEED = 25, 4, 7


def sampler(**place: int) -> TeachingSampler:
    return TeachingSampler(Shuffled(NUM, batch_size=BATCH, seed=SEED), **place)


def ids(of: TeachingSampler, num: int) -> list[list[int]]:
    return [ids.tolist() for ids, _ in islice(of, num)]


def test_its_order_is_that_of_a_teacher_that_chooses_nothing() -> None:
    config = paper_config(strategy="uniform")
    teacher = Teacher(LossBuffer(NUM), config, batch_size=BATCH, total_steps=100, data_seed=SEED)
    assert ids(sampler(), 40) == ids(TeachingSampler(teacher), 40)


def test_a_pass_has_every_example_once_but_for_what_fills_no_batch() -> None:
    batches = ids(sampler(), 12)
    first, second = sum(batches[:6], []), sum(batches[6:], [])
    assert len(set(first)) == len(set(second)) == 24 and first != second


def test_groups_stay_whole_in_a_batch_on_any_number_of_ranks_and_after_a_resume() -> None:
    num, batch, m = 36, 12, 3

    def grouped(**place: int) -> TeachingSampler:
        return TeachingSampler(Shuffled(num, batch_size=batch, seed=SEED, group_size=m), **place)

    def groups(ids: list[int]) -> list[list[int]]:
        return [ids[i : i + m] for i in range(0, len(ids), m)]

    whole = ids(grouped(), 9)
    for first in range(0, 9, 3):  # the passes: each input once, its rows in their order
        one_pass = groups(sum(whole[first : first + 3], []))
        assert sorted(one_pass) == groups(list(range(num))) != one_pass
    assert whole[:3] != whole[3:6]
    teacher = Teacher(
        LossBuffer(num), paper_config(strategy="uniform"), batch_size=batch, total_steps=9, data_seed=SEED, group_size=m
    )
    assert ids(TeachingSampler(teacher), 9) == whole
    first, resumed = grouped(), [grouped(rank=rank, num_ranks=2, microbatches=2) for rank in range(2)]
    ids(first, 4)
    for rank in resumed:
        rank.load_state_dict(first.state_dict())
    parts = [ids(rank, 10) for rank in resumed]
    again = [parts[0][i] + parts[0][i + 1] + parts[1][i] + parts[1][i + 1] for i in range(0, 10, 2)]
    assert again == whole[4:]


def test_ranks_share_a_batch() -> None:
    ranks = [ids(sampler(rank=rank, num_ranks=2, microbatches=2), 14) for rank in range(2)]
    whole = ids(sampler(), 7)
    for step, batch in enumerate(whole):
        assert sum((rank[2 * step + i] for rank in ranks for i in range(2)), []) == batch


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 13])
def test_a_resumed_run_continues(done: int) -> None:
    whole, first, again = ids(sampler(), 30), sampler(), sampler()
    assert ids(first, done) == whole[:done]
    again.load_state_dict(first.state_dict())
    assert ids(again, 30 - done) == whole[done:]


def test_after_a_run_that_chose_it_starts_a_pass_that_was_not_trained() -> None:
    again, whole = sampler(), ids(sampler(), 60)
    again.load_state_dict({"step": 13, "round": 3, "pass": 1, "consumed": 2})
    assert again.step == 13 and ids(again, 6) == whole[18:24]  # the fourth order: 13 steps lie in the first three


def test_it_counts_for_the_ledger() -> None:
    ledger = Ledger(batch_size=BATCH, tokens_per_example=1)
    ids(TeachingSampler(Shuffled(NUM, batch_size=BATCH, seed=SEED, ledger=ledger)), 5)
    assert ledger.examples_trained == ledger.examples_covered == 5 * BATCH


def test_fewer_examples_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="has 3 examples, fewer than one global batch of 4: write more data"):
        Shuffled(3, batch_size=4, seed=0)


def test_weights_are_ones_and_never_asked_for() -> None:
    assert all(weights.equal(torch.ones(BATCH)) for _, weights in islice(sampler(), 8))
