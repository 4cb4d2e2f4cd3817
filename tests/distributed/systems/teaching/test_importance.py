"""Importances, quantiles and shares over 1, 2 and 3 ranks against plain numpy over all examples at once."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks
from paper import paper_config

from titan_attent.data.plan.order import Pool
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.importance import IMPORTANCES, Evidence, finite_median, importance
from titan_attent.systems.teaching.radix import largest_keys, ordered_keys, score_of_key
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import STRATEGIES

NUM_EXAMPLES = 331
VOCAB_SIZE = 3000  # a uniform guess costs 8.0 nats: below some of the losses
NEVER, BROKEN = (5, 200), (17, 330)  # ids without a visit, and with non-finite losses only


def history() -> dict[str, np.ndarray]:
    """A first loss at steps 1 to 9 for all, a second one later for four in five."""
    rng = np.random.default_rng(1)
    first_step = rng.integers(1, 10, NUM_EXAMPLES)
    first = rng.uniform(2, 9, NUM_EXAMPLES).astype(np.float32)
    step = np.where(rng.random(NUM_EXAMPLES) < 0.8, first_step + rng.integers(1, 90, NUM_EXAMPLES), first_step)
    last = np.where(step > first_step, first - rng.uniform(-1, 2, NUM_EXAMPLES), first).astype(np.float32)
    gradient = rng.uniform(0, 1.4, NUM_EXAMPLES).astype(np.float32)
    expert = rng.uniform(0, 5, NUM_EXAMPLES).astype(np.float32)
    amateur = rng.uniform(0, 5, NUM_EXAMPLES).astype(np.float32)
    return {
        **{"first_step": first_step, "step": step, "first": first, "last": last},
        **{"gradient": gradient, "expert": expert, "amateur": amateur},
    }


def filled_buffer(mesh: Any) -> LossBuffer:
    buffer, h = LossBuffer(NUM_EXAMPLES, mesh=mesh, with_gradient=True), history()
    ids = np.array([i for i in range(NUM_EXAMPLES) if i not in NEVER])
    rank, size = buffer.sharding.rank, buffer.sharding.size
    for losses, steps in ((h["first"], h["first_step"]), (h["last"], h["step"])):
        for step in sorted(set(steps[ids])):
            now = ids[steps[ids] == step]
            mine = now[rank::size]
            # Equal counts on all ranks: pad with the id of a row that is ignored.
            mine = np.concatenate((mine, np.full(-(-len(now) // size) - len(mine), NUM_EXAMPLES)))
            values = np.append(losses, 0.0)[mine].astype(np.float32)
            values[np.isin(mine, BROKEN)] = np.nan
            buffer.record(
                torch.from_numpy(mine),
                torch.from_numpy(values),
                step=int(step),
                gradients=torch.from_numpy(np.append(h["gradient"], 0).astype(np.float32)[mine]),
            )
            buffer.sync()
    return buffer


def plain_importance(name: str) -> np.ndarray:
    h = {key: value.astype(np.float64) for key, value in history().items()}
    score = {
        "loss": h["last"],
        "functional_gradient": h["gradient"],
        "excess_loss": h["last"] - h["expert"],
        "cross_entropy_difference": h["amateur"] - h["expert"],
    }.get(name)
    if name == "cross_entropy_difference":
        return score  # the learner's visits do not matter
    if name == "attainment":
        median = sorted(h["last"][i] for i in range(NUM_EXAMPLES) if i not in (*NEVER, *BROKEN))[
            (NUM_EXAMPLES - len((*NEVER, *BROKEN)) - 1) // 2
        ]
        score = h["last"] * np.clip((np.log(VOCAB_SIZE) - h["last"]) / (np.log(VOCAB_SIZE) - median), 0, 1) ** 2
    if score is None:
        falls = {
            i: (h["first"][i] - h["last"][i]) / (np.log(h["step"][i]) - np.log(h["first_step"][i]))
            for i in range(NUM_EXAMPLES)
            if h["step"][i] > h["first_step"][i] and i not in (*NEVER, *BROKEN)
        }
        median = sorted(falls.values())[(len(falls) - 1) // 2]
        gate = np.array([np.clip(falls[i] / median, 0, 1) if i in falls else 1.0 for i in range(NUM_EXAMPLES)])
        score = h["last"] * gate
    score = score.copy()
    score[list(NEVER)], score[list(BROKEN)] = np.inf, -np.inf
    return score


def measure(mesh: Any) -> dict[str, Any]:
    buffer = filled_buffer(mesh)
    sharding = buffer.sharding
    expert, amateur = (
        torch.from_numpy(history()[name])[sharding.start : sharding.stop] for name in ("expert", "amateur")
    )
    evidence = Evidence(expert=expert, amateur=amateur, chance_loss=math.log(VOCAB_SIZE))
    scores = {name: importance(buffer.records(), name=name, evidence=evidence) for name in IMPORTANCES}
    loss = scores["loss"]
    where = torch.isfinite(loss)
    everything = Candidates(Pool.whole(NUM_EXAMPLES), owners=sharding, sharding=sharding, device=loss.device)
    scores_of = {name: Scores(score, sharding=sharding) for name, score in scores.items()}
    drawn = {
        seed: STRATEGIES["threshold"](
            scores_of["loss"], 0, paper_config(strategy="threshold"), (0, seed, 0), everything
        )
        for seed in range(3)
    }
    keys = ordered_keys(torch.where(where, loss, -torch.inf))
    (third,) = largest_keys(lambda block: keys[block], lambda *_: [3], sharding=sharding, device=loss.device)
    nothing = torch.full_like(loss, torch.inf)
    return {
        "scores": {name: score.numpy() for name, score in scores.items()},
        "third": score_of_key(third.key),
        "none": finite_median(lambda block: nothing[block], sharding=sharding, device=loss.device),
        "clipped": scores_of["loss"].summary.clipped(loss).numpy(),
        "statistics": {name: (each.summary, each.metrics) for name, each in scores_of.items()},
        "threshold": {seed: (weights.numpy(), num_chosen) for seed, (weights, num_chosen) in drawn.items()},
        "visits": buffer.visits.numpy(),
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def measured(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_on_ranks(measure, request.param)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return measure(None)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_importance_is_that_of_a_loop(measured: list[dict[str, Any]], name: str) -> None:
    scores = np.concatenate([rank["scores"][name] for rank in measured])
    np.testing.assert_allclose(scores, plain_importance(name), rtol=2e-5, atol=2e-6)


def test_quantiles_and_clipping(measured: list[dict[str, Any]]) -> None:
    loss = plain_importance("loss").astype(np.float32)
    ordered = np.sort(loss[np.isfinite(loss)])
    assert [rank["third"] for rank in measured] == [float(ordered[-3])] * len(measured)
    assert measured[0]["none"] is None
    expected = np.where(
        np.isfinite(loss), loss.clip(ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]), loss
    )
    assert np.array_equal(np.concatenate([rank["clipped"] for rank in measured]), expected)
    assert (expected != loss).sum() == 2 * (len(ordered) // 100) == 6


def plain_share(scores: np.ndarray) -> float:
    scores = scores.clip(min=0)
    return scores.sum() ** 2 / len(scores) / (scores**2).sum()


@pytest.mark.parametrize("name", IMPORTANCES)
def test_the_statistics_of_scores_are_those_of_a_sort_for_any_number_of_ranks(
    measured: list[dict[str, Any]], alone: dict[str, Any], name: str
) -> None:
    scores = np.concatenate([rank["scores"][name] for rank in measured]).astype(np.float64)
    finite = np.sort(scores[np.isfinite(scores)])
    clipped = finite.clip(finite[3], finite[-4])  # 1% of 327 at each end
    for rank in measured:
        assert rank["statistics"][name] == alone["statistics"][name]
        summary, metrics = rank["statistics"][name]
        others = 0 if name == "cross_entropy_difference" else 2  # it reads nothing of the learner
        assert (summary.num_finite, summary.num_unseen, summary.num_broken) == (len(finite), others, others)
        ordered = [
            summary.largest,
            summary.high,
            summary.quarantine_threshold,
            summary.p99,
            summary.low,
            summary.smallest,
        ]
        assert ordered == finite[[-1, -4, -3, -3, 3, 0]].tolist()
        lowest = min(0.0, clipped[0])
        expected = (finite.mean(), plain_share(finite), plain_share(clipped), plain_share(clipped - lowest))
        actual = (metrics.mean, metrics.share, metrics.clipped_share, metrics.shifted_share)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert (finite[3] < 0) == (name in ("excess_loss", "cross_entropy_difference"))


def test_threshold_leaves_out_half_of_those_below_the_mean(
    measured: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    """InfoBatch's rule per example: above the mean all are kept with weight w, below it half are kept with 2 w."""
    loss = plain_importance("loss")
    mean = loss[np.isfinite(loss)].mean()
    below = loss < mean  # -inf too
    for seed in range(3):
        weights = np.concatenate([rank["threshold"][seed][0] for rank in measured])
        assert np.array_equal(weights, alone["threshold"][seed][0])
        chosen = weights > 0
        assert all(rank["threshold"][seed][1] == chosen.sum() for rank in measured)
        assert chosen[~below].all()
        kept, num_below = chosen[below].sum(), below.sum()
        assert abs(kept - num_below / 2) < 4 * (num_below / 4) ** 0.5
        assert weights[chosen].mean() == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(weights[chosen & below] / weights[~below][0], 2.0, rtol=1e-6)
        assert (weights[~chosen] == 0).all()
    assert not np.array_equal(*(np.concatenate([r["threshold"][seed][0] for r in measured]) > 0 for seed in (0, 1)))


def test_share_of_equal_and_of_few() -> None:
    def share(scores: torch.Tensor) -> float:
        return Scores(scores, sharding=ExampleSharding(8)).metrics.share

    assert share(torch.full((8,), 3.0)) == pytest.approx(1.0)
    few = torch.tensor([2.0, 2.0, 0, 0, 0, 0, -1.0, 0])
    assert share(few) == pytest.approx(2 / 8)
    assert share(torch.full((8,), float("inf"))) == 1.0
    assert share(torch.zeros(8)) == 1.0


def test_a_score_is_no_visit() -> None:
    buffer = LossBuffer(4)
    buffer.record(
        torch.tensor([1, 2, 4, 9]), torch.tensor([3.0, float("nan"), 7.0, float("nan")]), step=5, trained=False
    )
    buffer.sync()
    assert buffer.visits.tolist() == [0, 0, 0, 0]
    assert buffer.step.tolist() == [-1, 5, -1, -1] and buffer.loss[1] == 3.0
    assert buffer.num_nonfinite == 1  # rows to leave out are not counted


def test_gradients_must_be_recorded_where_they_are_kept() -> None:
    with pytest.raises(ValueError, match="keeps gradients: record them with gradients="):
        LossBuffer(4, with_gradient=True).record(torch.tensor([1]), torch.tensor([1.0]), step=1)


def test_attainment_is_the_loss_until_the_median_example_has_made_progress() -> None:
    buffer = LossBuffer(5)
    losses = torch.tensor([5.0, 6.0, 4.5, 3.0, 7.0])
    buffer.record(torch.arange(5), losses, step=1)
    buffer.sync()
    evidence = Evidence(chance_loss=math.log(100))  # ln 100 = 4.6, the median is 5
    assert torch.equal(importance(buffer.records(), name="attainment", evidence=evidence), losses)
    scores = importance(buffer.records(), name="attainment", evidence=Evidence(chance_loss=math.log(10_000)))
    assert scores.tolist() == pytest.approx([5.0 * 1, 6 * (3.21034 / 4.21034) ** 2, 4.5, 3.0, 7 * 0.275603], rel=1e-4)
