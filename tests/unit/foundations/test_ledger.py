"""ledger.py against accounts computed by hand, with a clock set by the test."""

import math

import pytest

from titan_attent.foundations.ledger import RUN_ACCOUNTS, TEACHING_ACCOUNTS, Ledger, LedgerAccount


class Clock:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def accounts(**seconds: float) -> dict[str, float]:
    return dict.fromkeys((*RUN_ACCOUNTS, *(account.name for account in TEACHING_ACCOUNTS)), 0.0) | seconds


def test_metrics_are_the_accounts_computed_by_hand(clock):
    ledger = Ledger(batch_size=8, tokens_per_example=100, clock=clock)
    clock.now += 30.0  # building the model
    ledger.start()
    for seconds, account in ((1.0, "select"), (0.5, "exchange"), (2.0, "select"), (1.5, "score"), (4.0, "train")):
        with ledger.charge(account):
            clock.now += seconds
    clock.now += 1.0  # logging
    ledger.examples_scored, ledger.prepaid_seconds = 5, 0.25
    for covered in (1.0, 1.0, 2.5):
        ledger.batch_served(covered_per_trained=covered)
    assert ledger.metrics() == pytest.approx(
        {
            f"ledger/{name}_seconds": value
            for name, value in accounts(score=1.5, select=3, exchange=0.5, train=4).items()
        }
        | {
            "ledger/wall_seconds": 10.0,
            "ledger/prepaid_seconds": 0.25,
            "ledger/overhead_percent": 50.0,
            "ledger/examples_trained": 24.0,
            "ledger/examples_covered": 8 + 8 + 20,
            "ledger/examples_skipped": 12.0,
            "ledger/examples_scored": 5.0,
            "ledger/skipped_share": 1 / 3,
            "ledger/break_even_share": 5.25 / (36 * 4 / 24),  # training all covered examples would take 6 seconds
            "ledger/tokens_covered_per_second": 360.0,
        }
    )


def test_an_account_inside_another_stops_the_outer_clock(clock):
    ledger = Ledger(batch_size=1, tokens_per_example=1, clock=clock)
    with ledger.charge("train"):
        clock.now += 1.0
        with ledger.charge("load"):
            clock.now += 2.0
            with ledger.charge("select"):
                clock.now += 4.0
                # Open accounts are counted up to now.
                assert ledger.metrics()["ledger/select_seconds"] == 4.0
                clock.now += 0.5
            clock.now += 8.0
        clock.now += 16.0
    clock.now += 100.0
    assert ledger.seconds == accounts(train=17.0, load=10.0, select=4.5)


def test_a_block_that_raises_is_charged(clock):
    ledger = Ledger(batch_size=1, tokens_per_example=1, clock=clock)
    with ledger.charge("train"):
        with pytest.raises(KeyError), ledger.charge("select"):
            clock.now += 4.0
            raise KeyError
        clock.now += 1.0
    assert ledger.seconds == accounts(select=4.0, train=1.0)


def test_a_charged_function_keeps_arguments_and_result(clock):
    ledger = Ledger(batch_size=1, tokens_per_example=1, clock=clock)

    def wait(seconds: float, *, then: str) -> str:
        clock.now += seconds
        return then

    assert ledger.charged("save", wait)(3.0, then="done") == "done"
    assert ledger.seconds == accounts(save=3.0)


def test_a_resumed_ledger_continues(clock):
    before = Ledger(batch_size=4, tokens_per_example=10, clock=clock)
    with before.charge("select"):
        clock.now += 2.0
    before.batch_served(covered_per_trained=2.0)
    before.examples_scored = 7
    clock.now += 3.0
    state = before.state_dict()
    clock.now += 1000.0  # between the runs
    after = Ledger(batch_size=4, tokens_per_example=10, clock=clock)
    clock.now += 50.0  # the new run's start-up
    after.load_state_dict(state)
    clock.now += 20.0  # after the checkpoint was loaded, before the first batch
    after.start()
    clock.now += 5.0
    with after.charge("select"):
        clock.now += 1.0
    after.batch_served(covered_per_trained=1.0)
    assert after.wall_seconds == pytest.approx(5.0 + 6.0)
    assert after.seconds == accounts(select=3.0)
    assert (after.examples_trained, after.examples_covered, after.examples_scored) == (8, 12.0, 7)
    assert state["seconds"] == accounts(select=2.0)  # not shared


def test_accounts_of_systems(clock):
    """Seconds charged by a system other than the teacher are in that system's state, whether overhead or not."""
    ledger = Ledger(
        batch_size=1,
        tokens_per_example=1,
        accounts=[LedgerAccount("probe"), LedgerAccount("look", is_overhead=True)],
        clock=clock,
    )
    with ledger.charge("probe"):
        clock.now += 2.0
    with ledger.charge("look"):
        clock.now += 2.0
    assert ledger.seconds == dict.fromkeys(RUN_ACCOUNTS, 0.0) | {"probe": 2.0, "look": 2.0}
    assert ledger.metrics()["ledger/probe_seconds"] == 2.0 and ledger.metrics()["ledger/overhead_percent"] == 50.0
    assert ledger.state_dict()["seconds"] == dict.fromkeys(RUN_ACCOUNTS, 0.0)
    ledger.load_state_dict(ledger.state_dict())
    assert ledger.seconds["probe"] == 2.0


def test_metrics_at_time_zero_are_finite(clock):
    assert all(map(math.isfinite, Ledger(batch_size=1, tokens_per_example=1, clock=clock).metrics().values()))
