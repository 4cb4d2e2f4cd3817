"""guards.py and the fallback of draws.py with synthetic losses; draws on several ranks are in
distributed/systems/teaching/test_teacher.py."""

import copy
import logging
from unittest import mock

import pytest
import torch
from paper import paper_config

from titan_attent import LossBuffer, Teacher, TeachingSampler
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching import advice
from titan_attent.systems.teaching.guards import Quarantine

NUM_EXAMPLES, BATCH = 200, 10
STUBBORN = (7, 150)  # the two of the top 1%


def run(losses_at, *, steps: int, expert=None, **config) -> tuple[Teacher, list[dict], list[set[int]]]:
    """``losses_at(step)``: fp32 [N]. Returns the teacher, the quarantined examples, the ids of each selected pass."""
    settings = {"strategy": "hard", "ratio_schedule": "constant", "initial_ratio": 0.5, "max_interval": 1}
    quarantined: list[dict] = []
    teacher = Teacher(
        LossBuffer(NUM_EXAMPLES),
        paper_config(**settings | {"full_data_tail": 0.0} | config),
        batch_size=BATCH,
        total_steps=1000,
        expert=expert,
        on_quarantine=quarantined.append,
    )
    passes: list[set[int]] = []
    for step, (ids, _) in zip(range(1, steps + 1), TeachingSampler(teacher), strict=False):
        teacher.buffer.record(ids, losses_at(step)[ids], step=step)
        teacher.step_done()
        if teacher.rounds.selecting:
            one = teacher.current_pass()
            if not passes or one is not passes[-1]:
                passes.append(one)
    return teacher, quarantined, [set(one.ids(0, one.num_batches).tolist()) for one in passes]


def falling(step: int) -> torch.Tensor:
    """The losses of all but the two stubborn examples fall."""
    losses = torch.linspace(2, 4, NUM_EXAMPLES) * 0.98**step
    losses[list(STUBBORN)] = 9.0
    return losses


def test_an_example_that_never_improves_is_set_aside_after_so_many_selections():
    # Warm-up to step 20, then a selection every 10 steps: taken at 20, 30, 40; the third in a row is seen at step 50.
    teacher, quarantined, passes = run(falling, steps=79, quarantine_after=3)
    assert [(line["example_id"], line["loss"]) for line in quarantined] == [(7, 9.0), (150, 9.0)]
    assert [line["step"] for line in quarantined] == [51, 51]
    assert [set(STUBBORN) <= ids for ids in passes] == [True] * 3 + [False] * 3
    assert not any(set(STUBBORN) & ids for ids in passes[3:])
    assert teacher.metrics()["teacher/quarantined"] == 2.0


def test_without_the_guard_it_is_selected_again_and_again():
    teacher, quarantined, passes = run(falling, steps=79, quarantine_after=0)
    assert not quarantined and all(set(STUBBORN) <= ids for ids in passes) and len(passes) == 6
    assert teacher.draws.quarantine is None and "teacher/quarantined" not in teacher.metrics()


def test_a_fall_of_five_percent_starts_the_row_anew():
    def slowly(step: int) -> torch.Tensor:
        return torch.where(torch.arange(NUM_EXAMPLES) == 7, 9.0 * 0.97 ** ((step - 1) // 10), falling(step))

    _, quarantined, _ = run(slowly, steps=199, quarantine_after=3)
    assert {line["example_id"] for line in quarantined} == {150}


def test_full_passes_still_train_it():
    teacher, quarantined, _ = run(falling, steps=60, quarantine_after=2)
    assert quarantined
    teacher.plan.tail_start = 60
    one = teacher.next_pass(step=60)
    assert set(STUBBORN) <= set(one.ids(0, one.num_batches).tolist())


@pytest.mark.parametrize("strategy", ["random", "soft", "threshold"])
def test_no_strategy_takes_it(strategy):
    _, quarantined, passes = run(falling, steps=200, quarantine_after=2, strategy=strategy, initial_ratio=0.9)
    taken_after = {line["example_id"]: line["step"] for line in quarantined}
    assert 150 in taken_after
    assert not any(150 in ids for ids in passes[-3:])


def run_pools(*, steps: int, save_at: int = -1) -> tuple[list[dict], Teacher]:
    """Pools of 50 of 200, half of each selected; the quarantined examples. ``save_at``: a new teacher resumes there."""

    def build() -> tuple[Teacher, TeachingSampler]:
        config = paper_config(
            strategy="hard",
            ratio_schedule="constant",
            initial_ratio=0.5,
            max_interval=1,
            full_data_tail=0.0,
            pool_size=50,
            quarantine_after=3,
        )
        teacher = Teacher(
            LossBuffer(NUM_EXAMPLES), config, batch_size=5, total_steps=1000, on_quarantine=quarantined.append
        )
        return teacher, TeachingSampler(teacher)

    quarantined: list[dict] = []
    teacher, sampler = build()
    stream = iter(sampler)
    for step in range(1, steps + 1):
        if step == save_at:
            kept = copy.deepcopy((teacher.state_dict(), sampler.state_dict()))
            teacher, sampler = build()
            teacher.load_state_dict(kept[0])
            sampler.load_state_dict(kept[1])
            stream = iter(sampler)
        ids, _ = next(stream)
        teacher.buffer.record(ids, falling(step)[ids], step=step)
        teacher.step_done()
    return quarantined, teacher


def test_with_pools_an_example_that_never_improves_is_set_aside_too():
    # An order is four pools of five steps. Taken in the orders 1, 2, 3; the third taking is counted in the fourth.
    quarantined, teacher = run_pools(steps=200)
    assert {line["example_id"] for line in quarantined} == set(STUBBORN)
    assert all(line["loss"] == 9.0 for line in quarantined)
    first_possible = 40 + 3 * 20  # warm-up, and three orders
    assert all(first_possible < line["step"] <= first_possible + 20 for line in quarantined)
    after = max(line["step"] for line in quarantined)
    assert teacher.buffer.step[list(STUBBORN)].max() < after < 180, "it was taken again"
    assert teacher.metrics()["teacher/quarantined"] == 2.0


def test_a_candidate_that_a_pool_leaves_out_keeps_its_row_and_is_not_counted():
    """As on the whole set: only a selection outside the top 1% ends a streak, a draw without the example does not."""
    guard = Quarantine(after=3, owners=ExampleSharding(1), device=torch.device("cpu"))
    nine = torch.tensor([9.0])

    def candidate(*, high: bool, taken: bool) -> int:
        new = guard.update(guard.streak, guard.loss_at_start, scores=nine, losses=nine, threshold=9.0 if high else 10.0)
        guard.mark(guard.streak, weights=torch.tensor([float(taken)]))
        return len(new)

    row = [(True, True), (True, True), (True, False), (True, False), (False, True)]
    assert [candidate(high=high, taken=taken) for high, taken in row] == [0] * 5
    assert int(guard.streak) & 0xFF == 2  # the two selections that were followed by another draw
    assert candidate(high=False, taken=True) == 0 and int(guard.streak) & 0xFF == 0
    assert [candidate(high=True, taken=True) for _ in range(3)] == [0, 0, 1]
    assert guard.quarantined(guard.streak).tolist() == [True]
    assert candidate(high=True, taken=True) == 0  # a pass over everything takes it, and it is not counted again


def test_selections_that_are_not_counted_yet_are_in_a_checkpoint():
    whole, _ = run_pools(steps=130)
    resumed, _ = run_pools(steps=130, save_at=72)
    assert whole and resumed == whole


def one_rules(step: int) -> torch.Tensor:
    """Four of 200 have a loss at all: an effective sample size of 2%."""
    return torch.where(torch.arange(NUM_EXAMPLES) < 4, 5.0, 0.0)


def test_a_round_that_few_examples_would_dominate_trains_the_whole_pool_and_logs_it(caplog):
    with caplog.at_level(logging.WARNING):
        teacher, _, passes = run(one_rules, steps=40, min_effective_sample_size=0.05)
    assert passes[0] == set(range(NUM_EXAMPLES)) and teacher.metrics()["teacher/fallback"] == 1.0
    assert "The pass after step 20 trains its whole pool" in caplog.text
    assert "2.00% of the pool, under teacher.min_effective_sample_size = 0.05" in caplog.text
    teacher, _, passes = run(one_rules, steps=30, min_effective_sample_size=0.01)
    assert len(passes[0]) == 100 and teacher.metrics()["teacher/fallback"] == 0.0


def test_negative_excess_losses_do_not_cause_the_fallback():
    """All but four of 200 excess losses are negative, and differ little: no few examples dominate the selection."""
    losses = torch.linspace(1.0, 1.5, NUM_EXAMPLES)
    excess = torch.where(torch.arange(NUM_EXAMPLES) < 4, 0.1, -torch.linspace(0.5, 1.0, NUM_EXAMPLES))
    settings = {"importance": "excess_loss", "min_effective_sample_size": 0.05}
    teacher, _, passes = run(lambda step: losses, steps=30, expert=losses - excess, **settings)
    assert passes[0] == set(range(100)) and teacher.metrics()["teacher/fallback"] == 0.0


def test_it_says_so_once_a_run_and_on_the_first_rank_alone(caplog):
    with caplog.at_level(logging.INFO):
        teacher, _, passes = run(one_rules, steps=79, min_effective_sample_size=0.05)
    assert len(passes) == 3 and teacher.metrics()["teacher/fallback"] == 1.0
    assert caplog.text.count("trains its whole pool") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO), mock.patch.object(torch.distributed, "is_initialized", lambda: True):
        with mock.patch.object(torch.distributed, "get_rank", lambda: 3):
            run(one_rules, steps=40, min_effective_sample_size=0.05)
            advice.log_plan(teacher.config, teacher.plan, num_examples=NUM_EXAMPLES, batch_size=BATCH, total_steps=10)
            teacher.ledger.seconds = dict.fromkeys(teacher.ledger.seconds, 0.0) | {"train": 100.0, "score": 150.0}
            assert advice.warn_below_break_even(teacher.ledger)
        assert not caplog.records
        with mock.patch.object(torch.distributed, "get_rank", lambda: 0):
            advice.log_plan(teacher.config, teacher.plan, num_examples=NUM_EXAMPLES, batch_size=BATCH, total_steps=10)
            assert advice.warn_below_break_even(teacher.ledger)
        assert len(caplog.records) >= 3


def test_random_subsets_have_no_effective_sample_size_to_fall_under():
    _, _, passes = run(one_rules, steps=30, min_effective_sample_size=0.05, strategy="random")
    assert len(passes[0]) == 100


def test_a_run_below_its_break_even_line_says_so_once(caplog):
    teacher, _, _ = run(falling, steps=79, quarantine_after=0)
    teacher._warned = False
    teacher.ledger.seconds = dict.fromkeys(teacher.ledger.seconds, 0.0) | {"train": 100.0, "score": 150.0}
    skipped, needed = teacher.ledger.skipped_share, teacher.ledger.break_even_share
    assert 0.2 < skipped < 0.5 < needed
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        teacher.next_pass(step=80)
        teacher.next_pass(step=90)
    assert caplog.text.count("Teaching costs more compute than it saves") == 1
    assert f"{skipped:.1%} of the examples were skipped, but {needed:.1%} would pay for scoring" in caplog.text
