"""Scores on disk: selections by them from step 1 on, over 1, 2 and 3 ranks, against plain numpy."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks

from titan_attent import LossBuffer, Teacher, TeacherConfig, TeachingSampler
from titan_attent.losses.records import NEVER, Records
from titan_attent.systems.teaching.schedule import calibrated_ratio

NUM_EXAMPLES, BATCH, VOCAB_SIZE = 203, 12, 1000
TRUSTED = np.random.default_rng(5).normal(0.4, 0.3, 400).astype(np.float32).tolist()
DIFFERENCE = TeacherConfig(
    strategy="hard",
    importance="cross_entropy_difference",
    ratio_schedule="calibrated",
    max_repeats=100.0,
    full_data_tail=0.0,
)
ATTAINMENT = TeacherConfig(
    strategy="hard",
    scoring="amateur",
    initial_ratio=0.1,
    max_repeats=100.0,
    full_data_tail=0.0,
)
CASES = {
    "difference": DIFFERENCE,
    "difference, pools": replace(DIFFERENCE, pool_size=60),
    "attainment": ATTAINMENT,
    "soft": replace(DIFFERENCE, strategy="soft"),
}


def losses_on_disk() -> tuple[np.ndarray, np.ndarray]:
    """(amateur's, expert's), fp32 [N]: the first 40% are dirt, which the amateur finds easier than the expert."""
    rng = np.random.default_rng(4)
    amateur = rng.uniform(3, 7.5, NUM_EXAMPLES).astype(np.float32)
    dirt = np.arange(NUM_EXAMPLES) < 0.4 * NUM_EXAMPLES
    return amateur, (amateur + np.where(dirt, 1.0, -0.4) + rng.normal(0, 0.3, NUM_EXAMPLES)).astype(np.float32)


def build(mesh: Any, config: TeacherConfig) -> tuple[Teacher, TeachingSampler]:
    buffer = LossBuffer(NUM_EXAMPLES, mesh=mesh, flush_every=3)
    sharding = buffer.sharding
    amateur, expert = (torch.from_numpy(losses)[sharding.start : sharding.stop] for losses in losses_on_disk())
    calibrated = config.ratio_schedule == "calibrated"
    teacher = Teacher(
        buffer,
        config,
        batch_size=BATCH,
        total_steps=60,
        expert=expert if config.importance == "cross_entropy_difference" else None,
        amateur=amateur,
        trusted=TRUSTED if calibrated else None,
        chance_loss=math.log(VOCAB_SIZE),
    )
    return teacher, TeachingSampler(teacher, rank=sharding.rank, num_ranks=sharding.size)


def train(mesh: Any, name: str, stop: int = 14, state: dict[str, Any] | None = None) -> dict[str, Any]:
    teacher, sampler = build(mesh, CASES[name])
    if state is not None:
        teacher.load_state_dict(state["teacher"])
        sampler.load_state_dict(state["sampler"])
    batches, chosen = [], []
    for step, (ids, _) in zip(range(sampler.step + 1, stop + 1), sampler, strict=False):
        # The learner's losses must not matter: the dirt has the highest.
        teacher.buffer.record(ids, torch.where(ids < 81, 9.0, 0.1), step=step)
        teacher.step_done()
        everyone = [ids] if mesh is None else list(teacher.buffer.sharding.gather(ids)[0])
        batches.append(np.sort(torch.cat(everyone).numpy()))
        chosen.append(len(teacher.current_pass().selected))
    state = {"teacher": teacher.state_dict(), "sampler": sampler.state_dict()} if mesh is None else None
    return {"batches": np.stack(batches), "chosen": chosen, "metrics": teacher.metrics(), "state": state}


def kept_by_difference() -> np.ndarray:
    amateur, expert = losses_on_disk()
    difference = amateur - expert
    cuts = np.sort(np.float32(TRUSTED))
    gains = [(difference < cut).mean() - 2 * (cuts < cut).mean() for cut in cuts]
    assert max(gains) > 0.1
    k = (difference >= cuts[np.argmax(gains)]).sum() // BATCH * BATCH
    return np.sort(np.argsort(-difference, kind="stable")[:k])


def kept_by_attainment() -> np.ndarray:
    amateur = losses_on_disk()[0].astype(np.float64)
    guess, median = math.log(VOCAB_SIZE), np.sort(amateur)[(NUM_EXAMPLES - 1) // 2]
    scores = amateur * np.clip((guess - amateur) / (guess - median), 0, 1) ** 2
    low, high = np.sort(scores)[[NUM_EXAMPLES // 100, -1 - NUM_EXAMPLES // 100]]
    clipped = scores.clip(low, high)
    share = clipped.sum() ** 2 / NUM_EXAMPLES / (clipped**2).sum()
    k = round(share**2 * NUM_EXAMPLES) // BATCH * BATCH
    return np.sort(np.argsort(-scores, kind="stable")[:k])


@pytest.mark.parametrize(
    "name, kept", [("difference", kept_by_difference()), ("attainment", kept_by_attainment())], ids=lambda x: str(x)[:9]
)
def test_the_first_pass_trains_what_numpy_would_keep(name: str, kept: np.ndarray) -> None:
    """From step 1 on: no warm-up, and no forward pass, since the teacher was given none."""
    assert 40 < len(kept) < 160
    run = train(None, name, stop=len(kept) // BATCH)
    assert np.array_equal(np.sort(run["batches"].ravel()), kept)
    assert set(run["chosen"]) == {len(kept)}
    assert run["metrics"]["ledger/examples_scored"] == 0 and run["metrics"]["teacher/round"] == 1


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_chooses_the_same(name: str, num_ranks: int) -> None:
    alone, ranks = train(None, name), run_on_ranks(train, num_ranks, name)
    for rank in ranks:
        assert np.array_equal(rank["batches"], alone["batches"]) and rank["chosen"] == alone["chosen"]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_goes_on(name: str) -> None:
    whole, half = train(None, name), train(None, name, stop=5)
    rest = train(None, name, state=half["state"])
    assert np.array_equal(np.concatenate((half["batches"], rest["batches"])), whole["batches"])


def test_pools_keep_what_is_above_the_cut_of_the_trusted_text() -> None:
    amateur, expert = losses_on_disk()
    run = train(None, "difference, pools", stop=8)
    assert np.isin(run["batches"], kept_by_difference()).mean() > 0.9
    assert (run["batches"] < 81).mean() < 0.05 and len(set(run["chosen"])) > 1  # each pool has another share


def test_the_amateur_counts_where_the_learner_has_no_loss_yet() -> None:
    """excess_loss with an amateur: the learner's loss where an example was trained, the amateur's elsewhere."""
    amateur, expert = losses_on_disk()
    config = TeacherConfig(
        strategy="hard",
        importance="excess_loss",
        **{"ratio_schedule": "constant", "initial_ratio": 0.3},
        full_data_tail=0.0,
    )
    buffer = LossBuffer(NUM_EXAMPLES)
    given = {"expert": torch.from_numpy(expert), "amateur": torch.from_numpy(amateur)}
    teacher = Teacher(buffer, config, batch_size=BATCH, total_steps=60, **given)
    sampler = iter(TeachingSampler(teacher))
    first = torch.cat([next(sampler)[0] for _ in range(5)])
    expected = np.argsort(-(amateur - expert), kind="stable")[:60]
    assert np.array_equal(np.sort(first.numpy()), np.sort(expected))
    buffer.record(first, torch.zeros(60), step=5)  # all learned: none of them comes again
    buffer.sync()
    second = torch.cat([next(sampler)[0] for _ in range(5)])
    scores = amateur - expert
    scores[first.numpy()] = -expert[first.numpy()]
    assert np.array_equal(np.sort(second.numpy()), np.sort(np.argsort(-scores, kind="stable")[:60]))


def test_readings_change_copies() -> None:
    buffer = LossBuffer(4)
    buffer.record(torch.tensor([1, 2]), torch.tensor([0.5, float("nan")]), step=7)
    buffer.sync()
    before = buffer.records()
    amateur = torch.tensor([3.0, 3.0, 3.0, 3.0])
    after, replaced = (before.with_scores(amateur, replace_all=flag) for flag in (False, True))
    assert after.loss.tolist()[:2] == [3.0, 0.5] and after.loss[3] == 3.0
    assert after.step.tolist() == [0, 7, NEVER, 0]  # trained but never finite: an amateur's loss does not replace that
    assert replaced.loss.tolist() == [3.0] * 4 and replaced.step.tolist() == [0] * 4
    assert before.step.tolist() == [NEVER, 7, NEVER, NEVER] and isinstance(before, Records)


@pytest.mark.parametrize("share_of_dirt", [0.05, 0.3, 0.9])
def test_the_calibrated_share_against_all_cuts(share_of_dirt: float) -> None:
    rng = np.random.default_rng(7)
    trusted, data = np.sort(rng.normal(0, 1, 300)), rng.normal(0, 1, 5000)
    data[: int(share_of_dirt * 5000)] -= 4
    below = [int((data < cut).sum()) for cut in trusted]
    gain, kept = max(((data < cut).mean() - 2 * (trusted < cut).mean(), (data >= cut).mean()) for cut in trusted)
    expected = kept if gain >= 0.1 else 1.0
    assert calibrated_ratio(below, num_examples=5000) == pytest.approx(expected)
    assert expected == 1.0 if share_of_dirt < 0.1 else abs(expected - (1 - share_of_dirt)) < 0.05


def test_trusted_text_above_all_and_below_all() -> None:
    assert calibrated_ratio([0, 0, 0], num_examples=10) == 1.0
    assert calibrated_ratio([10, 10, 10], num_examples=10) == 0.0  # selection_size makes it a batch


def test_where_nothing_is_left_out_the_order_is_uniforms() -> None:
    """The same ids in the same order in every step, as if there were no teacher."""
    amateur = torch.zeros(NUM_EXAMPLES)
    orders = []
    for config in (TeacherConfig(strategy="uniform"), DIFFERENCE):
        given: dict[str, Any] = {}
        if config is DIFFERENCE:
            given = {"expert": amateur, "amateur": amateur, "trusted": TRUSTED[:100] + [-1.0] * 100}
        teacher = Teacher(LossBuffer(NUM_EXAMPLES), config, batch_size=BATCH, total_steps=60, **given)
        orders.append(
            [next_ids.tolist() for _, (next_ids, _) in zip(range(40), TeachingSampler(teacher), strict=False)]
        )
        if config is DIFFERENCE:
            assert teacher.metrics()["teacher/ratio"] == 1.0
    assert orders[0] == orders[1]


@pytest.mark.parametrize("part", ["expert", "amateur", "trusted"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    given: dict[str, Any] = {"expert": torch.zeros(8), "amateur": torch.zeros(8), "trusted": [0.0], part: None}
    with pytest.raises(ValueError, match=f"`{part}`"):
        Teacher(LossBuffer(8), DIFFERENCE, batch_size=4, total_steps=9, **given)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["expert", "amateur", "trusted"])
def test_a_part_that_is_not_finite_is_refused(part: str, value: float) -> None:
    given: dict[str, Any] = {"expert": torch.zeros(8), "amateur": torch.zeros(8), "trusted": [0.0] * 8}
    given[part] = torch.tensor([0.0, value, 1.0, value] * 2) if part != "trusted" else [0.0, value, 1.0, value] * 2
    with pytest.raises(ValueError, match=f"4 of the 8 numbers in `{part}` are not finite"):
        Teacher(LossBuffer(8), DIFFERENCE, batch_size=4, total_steps=9, **given)


def test_a_strategy_that_does_not_read_the_ratio_goes_its_own_way() -> None:
    """InfoBatch leaves out half of the easy ones, whatever share the schedule would keep."""
    config = replace(DIFFERENCE, strategy="threshold", ratio_schedule="adaptive", initial_ratio=1.0)
    teacher, sampler = build(None, config)
    next(iter(sampler))
    assert 0.5 < teacher.metrics()["teacher/ratio"] < 0.95
