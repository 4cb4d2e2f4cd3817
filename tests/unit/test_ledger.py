"""ledger.py against hand-kept accounts with a clock of our own, and the audit against numpy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.sharding import ExampleSharding
from titan_attent.teacher import ledger as ledger_module
from titan_attent.teacher.ledger import Ledger, audit


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ledger_module, "time", clock)
    return clock


def test_metrics_are_the_hand_kept_accounts(clock):
    ledger = Ledger(batch_size=8, tokens_per_example=100)
    for seconds, account in ((1.0, "select"), (0.5, "exchange"), (2.0, "select"), (1.5, "score")):
        with ledger.charge(account):
            clock.now += seconds
    clock.now += 5.0  # training
    for covered in (1.0, 1.0, 2.5):
        ledger.step_done(covered_per_trained=covered)
    assert ledger.wall_seconds == pytest.approx(10.0)
    assert ledger.metrics() == pytest.approx(
        {
            "ledger/score_seconds": 1.5,
            "ledger/select_seconds": 3.0,
            "ledger/exchange_seconds": 0.5,
            "ledger/overhead_percent": 50.0,
            "ledger/examples_trained": 24.0,
            "ledger/examples_covered": 8 + 8 + 20,
            "ledger/tokens_covered_per_second": 360.0,
        }
    )


def test_a_block_that_raises_is_charged(clock):
    ledger = Ledger(batch_size=1, tokens_per_example=1)
    with pytest.raises(KeyError), ledger.charge("select"):
        clock.now += 4.0
        raise KeyError
    assert ledger.seconds == {"score": 0.0, "select": 4.0, "exchange": 0.0}


def test_a_resumed_ledger_goes_on_counting(clock):
    before = Ledger(batch_size=4, tokens_per_example=10)
    with before.charge("select"):
        clock.now += 2.0
    before.step_done(covered_per_trained=2.0)
    clock.now += 3.0
    state = before.state_dict()
    clock.now += 1000.0  # between the runs nobody trains
    after = Ledger(batch_size=4, tokens_per_example=10)
    clock.now += 50.0  # the new run's start-up, before the checkpoint is loaded
    after.load_state_dict(state)
    clock.now += 5.0
    with after.charge("select"):
        clock.now += 1.0
    after.step_done(covered_per_trained=1.0)
    assert after.wall_seconds == pytest.approx(5.0 + 6.0)
    assert after.seconds == {"score": 0.0, "select": 3.0, "exchange": 0.0}
    assert (after.examples_trained, after.examples_covered) == (8, 12.0)
    assert state["seconds"] == {"score": 0.0, "select": 2.0, "exchange": 0.0}  # the saved state is not shared


def test_metrics_before_any_time_has_passed_are_finite(clock):
    assert np.isfinite(list(Ledger(batch_size=1, tokens_per_example=1).metrics().values())).all()


def plain_audit(scores, ages, chosen, before, ever, weights) -> dict[str, float]:
    finite = scores[np.isfinite(scores)].astype(np.float64)
    aged = ages[ages >= 0]
    squares = (finite**2).sum()
    return {
        "teacher/importance_mean": finite.mean() if len(finite) else 0.0,
        "teacher/importance_p99": np.sort(finite)[-max(1, len(finite) // 100)] if len(finite) else 0.0,
        "teacher/effective_sample_size": finite.sum() ** 2 / (len(finite) * squares) if squares > 0 else 1.0,
        "teacher/loss_age": aged.mean() if len(aged) else 0.0,
        "teacher/never_selected": 1 - ever.mean(),
        "teacher/overlap": len(set(np.flatnonzero(chosen)) & set(np.flatnonzero(before))) / max(1, chosen.sum()),
        "teacher/max_weight": weights.max(),
    }


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 50, 1000]), st.floats(0, 1))
def test_audit_is_that_of_numpy(seed, size, share_infinite):
    generator = np.random.default_rng(seed)
    scores = generator.gamma(2.0, 1.5, size).astype(np.float32)
    infinite = generator.random(size) < share_infinite
    scores[infinite] = generator.choice([np.inf, -np.inf], infinite.sum())
    ages = np.where(infinite, -1, generator.integers(0, 99, size)).astype(np.int32)
    chosen, before, ever = (generator.random((3, size)) < 0.5) | [[False], [False], [False]]
    weights = np.where(chosen, generator.random(size), 0).astype(np.float32)
    given_names = ("scores", "ages", "chosen", "chosen_before", "ever_chosen", "weights")
    arrays = (scores, ages, chosen, before, ever, weights)
    tensors = {name: torch.from_numpy(array) for name, array in zip(given_names, arrays, strict=True)}
    # Sums of scores are taken in 2^-15 of the largest.
    assert audit(**tensors, sharding=ExampleSharding(size)) == pytest.approx(plain_audit(*arrays), rel=1e-3)


def test_importance_p99_takes_negative_scores_and_leaves_infinities_out():
    scores = torch.cat((torch.full((50,), float("inf")), -torch.arange(1.0, 301.0), torch.full((9,), float("-inf"))))
    nobody = torch.zeros(359, dtype=torch.bool)
    ages = torch.full((359,), -1, dtype=torch.int32)
    result = audit(
        scores=scores,
        ages=ages,
        chosen=nobody,
        chosen_before=nobody,
        ever_chosen=nobody,
        weights=torch.zeros(359),
        sharding=ExampleSharding(359),
    )
    assert result["teacher/importance_p99"] == -3.0
    assert result["teacher/importance_mean"] == pytest.approx(-150.5, rel=1e-4)
    assert result["teacher/never_selected"] == 1.0 and result["teacher/overlap"] == 0.0
    assert list(itertools.compress(result, [value == 0.0 for value in result.values()])) == [
        "teacher/loss_age",
        "teacher/overlap",
        "teacher/max_weight",
    ]
