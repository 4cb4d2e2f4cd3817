"""A selection never repeats more often than ``max_repeats``, and foreign trusted text selects nothing."""

import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from titan_attent import LossBuffer, Teacher, TeacherConfig, TeachingSampler
from titan_attent.systems.teaching.advice import log_plan
from titan_attent.systems.teaching.schedule import (
    MIN_LIKENESS,
    Likeness,
    Plan,
    calibrated_ratio,
    likeness,
    repeat_bound,
    selection_size,
)

NUM_EXAMPLES, BATCH = 2000, 40
CALIBRATED: dict[str, Any] = {
    "strategy": "hard",
    "importance": "cross_entropy_difference",
    "ratio_schedule": "calibrated",
    "full_data_tail": 0.0,
}
CLEAN = np.random.default_rng(0).normal(0.0, 1.0, NUM_EXAMPLES).astype(np.float32)
DIRTY = np.where(np.arange(NUM_EXAMPLES) % 10 < 1, CLEAN, CLEAN - 8).astype(np.float32)  # a tenth is clean
TRUSTED = np.random.default_rng(1).normal(0.0, 1.0, 500).tolist()


def train(
    differences: np.ndarray, *, steps: int, trusted: list[float] = TRUSTED, batch: int = BATCH, **changes: Any
) -> tuple[Counter[int], list[dict[str, Any]]]:
    """(how often each example was trained, the decisions) of a run that reads scores on disk."""
    decisions: list[dict[str, Any]] = []
    num = len(differences)
    teacher = Teacher(
        LossBuffer(num),
        TeacherConfig(**CALIBRATED | changes),
        batch_size=batch,
        total_steps=steps,
        amateur=torch.from_numpy(differences),
        expert=torch.zeros(num),
        trusted=trusted,
        chance_loss=7.0,
        sources=[("web", 0), ("code", num // 2)],
        on_decision=decisions.append,
    )
    visits: Counter[int] = Counter()
    for _, (ids, _) in zip(range(steps), TeachingSampler(teacher), strict=False):
        visits.update(ids.tolist())
        teacher.step_done()
    return visits, decisions


@pytest.mark.parametrize("strategy", ["hard", "soft"])
@pytest.mark.parametrize("pool_size", [0, 400])
@pytest.mark.parametrize(
    "steps, max_repeats, allowed",
    [(5, 0, 1), (20, 0, 1), (49, 0, 1), (50, 0, 1), (51, 0, 4), (100, 0, 4), (20, 2.5, 3), (20, 7, 7)],
)
def test_no_example_is_trained_more_often(
    steps: int, max_repeats: float, allowed: int, pool_size: int, strategy: str
) -> None:
    """5 steps need 200 examples, as many as are clean; 51 are more than a pass."""
    visits, _ = train(DIRTY, steps=steps, max_repeats=max_repeats, pool_size=pool_size, strategy=strategy)
    # Soft draws anew for each pass: none of its examples is bound to come again.
    assert max(visits.values()) <= allowed + (strategy == "soft")
    assert sum(visits.values()) == steps * BATCH


def test_a_selection_without_repeats_is_not_bounded() -> None:
    """Where the scores ask for more than the run trains, the bound changes nothing."""
    bounded, free = (train(DIRTY, steps=4, max_repeats=bound) for bound in (0.0, 1e9))
    assert bounded[0] == free[0] and 0.07 < bounded[1][0]["teacher/ratio"] < 0.11


def test_the_best_are_taken_first() -> None:
    visits, (decision, *_) = train(DIRTY, steps=20)
    assert set(visits) == set(np.argsort(-DIRTY, kind="stable")[:800].tolist())
    assert decision["teacher/ratio"] == 0.4 and decision["teacher/repeats"] == 1.0


@pytest.mark.parametrize("schedule", ["constant", "incremental", "cosine"])
def test_a_ratio_that_is_given_is_taken(schedule: str) -> None:
    config = TeacherConfig(**CALIBRATED | {"ratio_schedule": schedule})
    bound = repeat_bound(config, num_examples=NUM_EXAMPLES, batch_size=BATCH, total_steps=50)
    assert bound.min_ratio == 0.0


def test_the_adaptive_schedule_is_bounded_too() -> None:
    few = np.where(np.arange(NUM_EXAMPLES) < 50, 2.0, 0.01).astype(np.float32)
    rule = {"ratio_schedule": "adaptive", "initial_ratio": 0.01, "min_effective_sample_size": 0.0}
    loose, _ = train(few, steps=40, max_repeats=1e9, **rule)
    bounded, _ = train(few, steps=40, **rule)
    assert max(loose.values()) > 20 and max(bounded.values()) == 1


@pytest.mark.parametrize("num, batch, steps", [(2000, 8, 1), (2003, 12, 60), (97, 5, 40), (64, 64, 3), (100, 99, 2)])
@pytest.mark.parametrize("max_repeats", [0.0, 1.0, 1.7, 4.0])
def test_the_min_ratio_is_whole_batches_and_no_more(num: int, batch: int, steps: int, max_repeats: float) -> None:
    """The fewest whole batches that need no more repeats; all of the data if none are enough."""
    config = TeacherConfig(**CALIBRATED | {"max_repeats": max_repeats})
    bound = repeat_bound(config, num_examples=num, batch_size=batch, total_steps=steps)
    allowed = max_repeats or (1.0 if steps * batch <= num else 4.0)
    fits = [k for k in range(batch, num + 1, batch) if steps * batch <= allowed * k]
    expected = fits[0] if fits and fits[0] + batch <= num else num
    assert bound.min_ratio * num == pytest.approx(expected)


@pytest.mark.parametrize("pool_size", [0, 400])
@pytest.mark.parametrize("scale", [9.0, 40.0])
def test_trusted_text_of_another_kind_trains_everything(
    scale: float, pool_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    visits, decisions = train(DIRTY, steps=50, trusted=[t + scale for t in TRUSTED], pool_size=pool_size)
    assert set(visits.values()) == {1} and len(visits) == NUM_EXAMPLES
    assert all(decision["teacher/ratio"] == 1.0 for decision in decisions)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "of another kind than the data" in warned[0]


def test_a_rare_kind_is_still_chosen() -> None:
    """One example in a hundred is of the trusted kind: they are all selected."""
    rare = np.where(np.arange(NUM_EXAMPLES) % 100 == 0, CLEAN, CLEAN - 8).astype(np.float32)
    visits, (decision, *_) = train(rare, steps=10)
    assert {i for i in range(NUM_EXAMPLES) if i % 100 == 0} <= set(visits)
    assert decision["teacher/ratio"] == 0.2 and max(visits.values()) == 1


def test_a_handful_of_the_kind_is_not_repeated() -> None:
    """Two of 2,000 are of the trusted kind: a run of 400 would train them, and 398 others."""
    handful = np.where(np.arange(NUM_EXAMPLES) < 2, 1.0, CLEAN - 20).astype(np.float32)
    visits, (decision, *_) = train(handful, steps=10)
    assert decision["teacher/ratio"] == 1.0 and len(visits) == 400


def below_of(data: np.ndarray, trusted: np.ndarray) -> list[int]:
    return [int((data < t).sum()) for t in np.sort(trusted)]


def test_likeness_against_all_pairs() -> None:
    trusted = np.sort(np.float32(TRUSTED))
    for data in (CLEAN, DIRTY, CLEAN - 1, CLEAN - 4, np.zeros(NUM_EXAMPLES, dtype=np.float32)):
        below = below_of(data, trusted)
        kept = np.sort(data)[::-1][: round(calibrated_ratio(below, num_examples=NUM_EXAMPLES) * NUM_EXAMPLES)]
        wins = kept[:, None] >= trusted[None, :]
        variance = wins.mean(axis=0).var(ddof=1) / len(trusted) + wins.mean(axis=1).var() / len(kept)
        expected = Likeness(pytest.approx(wins.mean()), pytest.approx(variance**0.5))
        assert likeness(below, num_examples=NUM_EXAMPLES) == expected
        in_clusters = likeness(below, num_examples=NUM_EXAMPLES, cluster_size=9.0)
        assert in_clusters.standard_error == pytest.approx(3 * variance**0.5)
    same, other = (likeness(below_of(data, trusted), num_examples=NUM_EXAMPLES) for data in (DIRTY, CLEAN - 4))
    assert 0.4 < same.probability < 0.6 and other.probability < MIN_LIKENESS and other.is_low and not same.is_low
    assert likeness([10] * 40, num_examples=10) == (0.0, 0.0) and likeness([0] * 40, num_examples=10) == (1.0, 0.0)


def test_the_standard_error_is_the_spread_of_the_estimate() -> None:
    """Over samples of 60 trusted examples and 300 of the data, all of which are kept."""
    rng = np.random.default_rng(0)
    samples = [below_of(rng.normal(0, 1, 300), rng.normal(-0.5, 1, 60)) for _ in range(400)]
    found = [likeness(below, num_examples=300) for below in samples]
    assert all(calibrated_ratio(below, num_examples=300) == 1.0 for below in samples)
    spread = np.std([each.probability for each in found])
    assert np.mean([each.standard_error for each in found]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "shift, num_trusted, is_foreign", [(3.0, 40, False), (3.0, 200, False), (9.0, 40, True), (6.0, 200, True)]
)
def test_few_trusted_examples_are_foreign_only_if_that_is_significant(
    seed: int, shift: float, num_trusted: int, is_foreign: bool
) -> None:
    """Where trusted text scores 3 standard deviations above the kept data, the likeness is near the limit, and a third
    of the samples are below it.
    """
    rng = np.random.default_rng(seed)
    data = np.concatenate((rng.normal(0, 1, 1000), rng.normal(-9, 1, 1000)))
    below = below_of(data, rng.normal(shift, 1, num_trusted))
    assert likeness(below, num_examples=len(data)).is_low == is_foreign


def test_few_trusted_examples_near_the_limit_still_select() -> None:
    trusted = np.random.default_rng(1).normal(3, 1, 40)
    half = np.where(np.arange(NUM_EXAMPLES) % 2, CLEAN, CLEAN - 9).astype(np.float32)
    assert likeness(below_of(half, trusted), num_examples=NUM_EXAMPLES).probability < MIN_LIKENESS
    visits, (decision, *_) = train(half, steps=20, trusted=trusted.tolist())
    assert decision["teacher/ratio"] == 0.4 and all(i % 2 for i in visits)


@pytest.mark.parametrize(
    "steps, max_repeats, level, said",
    [
        (
            4,
            0.0,
            logging.INFO,
            ["from step 1 on, 8.0% of 2,000", "trained 1.0 times", "by source: web 7.9%, code 8.1%"],
        ),
        (20, 0.0, logging.WARNING, ["ask for 10.", "4.0 times each", "max_repeats = 1 it selects 40.0%"]),
        (20, 4.0, logging.WARNING, ["trained 4.0 times in this run", "more than 2 times"]),
        (240, 0.0, logging.INFO, ["nothing is left out", "trained 4.8 times"]),
    ],
)
def test_the_forecast_comes_before_the_selection_is_trained(
    steps: int, max_repeats: float, level: int, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(DIRTY, steps=steps, max_repeats=max_repeats)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert max(record.levelno for record in caplog.records) == max(level, logging.WARNING if "ask for" in text else 0)
    for part in said:
        assert text.count(part) == 1, f"{part!r} in:\n{text}"


def test_a_source_that_is_left_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    web_is_dirt = np.where(np.arange(NUM_EXAMPLES) < NUM_EXAMPLES // 2, CLEAN - 8, CLEAN).astype(np.float32)
    train(web_is_dirt, steps=10)
    (warned,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "Almost nothing of web is trained" in warned and "code 9" in warned


@pytest.mark.parametrize("pool_size, intervals", [(300, (1, 1)), (400, (3, 3)), (300, (2, 3)), (70, (1, 5))])
@pytest.mark.parametrize("steps, max_repeats, allowed", [(20, 0, 1), (25, 0, 1), (50, 0, 1), (70, 0, 4), (37, 3, 3)])
def test_pools_that_do_not_divide_the_data_or_are_passed_over_again_repeat_no_more(
    steps: int, max_repeats: float, allowed: int, pool_size: int, intervals: tuple[int, int]
) -> None:
    visits, decisions = train(
        DIRTY,
        steps=steps,
        max_repeats=max_repeats,
        pool_size=pool_size,
        interval_schedule="incremental",
        initial_interval=intervals[0],
        max_interval=intervals[1],
    )
    assert max(visits.values()) <= allowed and sum(visits.values()) == steps * BATCH
    assert decisions[0]["teacher/repeats"] <= allowed + 1e-9


@pytest.mark.parametrize("pool_size", [0, 300])
def test_where_everything_has_to_be_trained_a_pass_is_that_of_uniform(pool_size: int) -> None:
    visits, decisions = train(DIRTY, steps=50, pool_size=pool_size)
    assert set(visits.values()) == {1} and len(visits) == NUM_EXAMPLES and len(decisions) == 1


def test_fewer_passes_over_a_pool_than_requested_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    rule: dict[str, Any] = {"pool_size": 400, "initial_interval": 3, "max_repeats": 2.0}
    config = TeacherConfig(**CALIBRATED | rule)
    plan = Plan(config, steps_of_full_pass=50, total_steps=20, scorers=("expert", "amateur"))
    log_plan(config, plan, num_examples=NUM_EXAMPLES, batch_size=BATCH, total_steps=20)
    (warned,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "in 2 passes, not in the 3 of teacher.initial_interval: teacher.max_repeats = 2" in warned


@pytest.mark.parametrize(
    "rule, said, unsaid",
    [
        # A strategy that does not read the ratio is not held back from anything.
        ({"strategy": "threshold"}, "are selected", "The scores ask for"),
        ({"strategy": "random"}, "it selects 40.0%. Raise teacher.max_repeats", "the best first"),
        ({"dry_run": True}, "40.0% of 2,000 examples would be selected, each trained 1.0 times", "are selected"),
        # 10 steps on all, 10 on the tenth that the scores ask for: 0.2 + 0.2 / 0.1 times.
        ({"full_data_tail": 0.5}, "which this run would train 2.2 times each", "4.0 times"),
        # 0.2, 0.4, ... of the data a pass: the sum of the inverses, not the inverse of the mean.
        (
            {"ratio_schedule": "incremental", "initial_ratio": 0.2, "final_ratio": 1.0},
            "each trained 0.8 times",
            "2.0 times",
        ),
    ],
)
def test_the_logged_numbers_are_those_of_the_run(
    rule: dict[str, Any], said: str, unsaid: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(DIRTY, steps=20, **rule)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert said in text and unsaid not in text, text


@pytest.mark.parametrize("rule", [{"initial_ratio": 0.3}, {"ratio_schedule": "incremental", "initial_ratio": 0.1}])
def test_visits_against_a_walk_over_the_rounds(rule: dict[str, Any]) -> None:
    config = TeacherConfig(**CALIBRATED | {"ratio_schedule": "constant"} | rule)
    plan, step, passes = Plan(config, steps_of_full_pass=50, total_steps=5000, scorers=("expert", "amateur")), 0, 0.0
    while step < 5000:
        batches = selection_size(NUM_EXAMPLES, ratio=plan.ratio(step) or 1.0, batch_size=BATCH) // BATCH
        passes, step = passes + min(1.0, (5000 - step) / batches), step + batches
    visits = plan.visits(None, num_examples=NUM_EXAMPLES, batch_size=BATCH)
    assert visits == pytest.approx(passes, rel=0.02) and visits > 5000 / 50


def test_a_run_that_resumes_in_its_tail_forecasts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The tail trains everything whatever was selected before; repeats are still those of the selection."""
    caplog.set_level(logging.INFO)

    def build() -> Teacher:
        config = TeacherConfig(**CALIBRATED | {"full_data_tail": 0.5, "max_repeats": 8.0})
        return Teacher(
            LossBuffer(NUM_EXAMPLES),
            config,
            batch_size=BATCH,
            total_steps=200,
            amateur=torch.from_numpy(DIRTY),
            expert=torch.zeros(NUM_EXAMPLES),
            trusted=TRUSTED,
        )

    teacher = build()
    teacher.next_pass(step=0)
    before = teacher.metrics()["teacher/repeats"]
    resumed = build()
    resumed.load_state_dict(teacher.state_dict())
    caplog.clear()
    resumed.next_pass(step=100)
    assert not caplog.records and resumed.rounds.in_tail
    assert resumed.metrics()["teacher/repeats"] == before == pytest.approx(2 + 2 / 0.5)
