"""guards.py and the fallback of draws.py with losses made up for the purpose; draws of several ranks are in
distributed/test_teacher.py."""

import logging

import pytest
import torch

from titan_attent import LossBuffer, Teacher, TeacherConfig, TeachingSampler

NUM_EXAMPLES, BATCH = 200, 10
STUBBORN = (7, 150)  # the two of the top 1%


def run(losses_at, *, steps: int, reference=None, **config) -> tuple[Teacher, list[dict], list[set[int]]]:
    """``losses_at(step)``: fp32 [N]. Returns the teacher, what was set aside, and the ids of each selected pass."""
    settings = {"strategy": "hard", "ratio_schedule": "constant", "initial_ratio": 0.5, "max_interval": 1}
    quarantined: list[dict] = []
    teacher = Teacher(
        LossBuffer(NUM_EXAMPLES),
        TeacherConfig(**settings | {"anneal_fraction": 0.0} | config),
        batch_size=BATCH,
        total_steps=1000,
        reference=reference,
        on_quarantine=quarantined.append,
    )
    passes: list[set[int]] = []
    for step, (ids, _) in zip(range(1, steps + 1), TeachingSampler(teacher), strict=False):
        teacher.buffer.record(ids, losses_at(step)[ids], step=step)
        teacher.step_done()
        if teacher.selecting:
            one = teacher.current_pass()
            if not passes or one is not passes[-1]:
                passes.append(one)
    return teacher, quarantined, [set(one.ids(0, one.num_batches).tolist()) for one in passes]


def falling(step: int) -> torch.Tensor:
    """Everything learns but the stubborn two."""
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


def test_without_the_guard_it_is_taught_for_ever():
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
    teacher.plan.anneal_start = 60
    one = teacher.next_pass(step=60)
    assert set(STUBBORN) <= set(one.ids(0, one.num_batches).tolist())


@pytest.mark.parametrize("strategy", ["random", "soft", "threshold"])
def test_no_strategy_takes_it(strategy):
    _, quarantined, passes = run(falling, steps=200, quarantine_after=2, strategy=strategy, initial_ratio=0.9)
    taken_after = {line["example_id"]: line["step"] for line in quarantined}
    assert 150 in taken_after
    assert not any(150 in ids for ids in passes[-3:])


def one_rules(step: int) -> torch.Tensor:
    """Four of 200 have a loss at all: an effective sample size of 2%."""
    return torch.where(torch.arange(NUM_EXAMPLES) < 4, 5.0, 0.0)


def test_a_round_that_a_handful_would_rule_trains_the_whole_pool_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        teacher, _, passes = run(one_rules, steps=40, min_effective_sample_size=0.05)
    assert passes[0] == set(range(NUM_EXAMPLES)) and teacher.metrics()["teacher/fallback"] == 1.0
    assert "The pass after step 20 trains its whole pool" in caplog.text
    assert "2.00% of the pool, under teacher.min_effective_sample_size = 0.05" in caplog.text
    teacher, _, passes = run(one_rules, steps=30, min_effective_sample_size=0.01)
    assert len(passes[0]) == 100 and teacher.metrics()["teacher/fallback"] == 0.0


def test_a_reference_that_was_overtaken_is_no_handful_that_rules():
    """All but four of 200 excess losses are negative, and differ little: nobody rules the selection of the largest."""
    losses = torch.linspace(1.0, 1.5, NUM_EXAMPLES)
    excess = torch.where(torch.arange(NUM_EXAMPLES) < 4, 0.1, -torch.linspace(0.5, 1.0, NUM_EXAMPLES))
    settings = {"importance": "excess_loss", "reference_path": "given", "min_effective_sample_size": 0.05}
    teacher, _, passes = run(lambda step: losses, steps=30, reference=losses - excess, **settings)
    assert passes[0] == set(range(100)) and teacher.metrics()["teacher/fallback"] == 0.0


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
    assert f"{skipped:.1%} of the examples were skipped, {needed:.1%} pay for scoring" in caplog.text
