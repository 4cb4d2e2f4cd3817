"""The seconds that freezing saved: which steps count, before and after a resume."""

import json

from titan_attent.systems.freezing.account import UNTIMED_STEPS, FreezingAccount
from titan_attent.systems.freezing.units import Unit

UNITS = [Unit(f"layers.{i}.attention", "attention", i, weight=1.0, inputs=1.0) for i in range(3)]
ALL, SOME = [True] * 3, [False, True, True]


def account(resumed: FreezingAccount | None = None) -> FreezingAccount:
    made = FreezingAccount(UNITS, batch_size=2, microbatches=1, reduced_bytes=4)
    if resumed is not None:
        made.load(json.loads(json.dumps(resumed.state())))
    return made


def steps(account: FreezingAccount, number: int, active: list[bool], *, seconds: float) -> None:
    for _ in range(number):
        account.step_done(active, seconds=seconds)


def test_the_first_steps_of_every_process_do_not_count() -> None:
    run = account()
    steps(run, UNTIMED_STEPS, ALL, seconds=60.0)  # compiles
    steps(run, 4, ALL, seconds=1.0)
    steps(run, 2, SOME, seconds=0.75)
    assert run.saved_seconds == 0.5
    for _ in range(2):
        run = account(run)
        steps(run, UNTIMED_STEPS, SOME, seconds=60.0)
        assert run.saved_seconds == 0.5
    steps(run, 2, SOME, seconds=0.75)
    assert run.saved_seconds == 1.0


def test_a_resumed_run_continues_all_other_counts() -> None:
    whole, first = account(), account()
    steps(whole, 9, SOME, seconds=1.0)
    steps(first, 4, SOME, seconds=1.0)
    resumed = account(first)
    steps(resumed, 5, SOME, seconds=1.0)
    assert resumed.counts == whole.counts and resumed.counts["steps"] == 9


def test_a_run_that_is_resumed_within_its_first_steps() -> None:
    run = account()
    for _ in range(3):
        steps(run, 2, ALL, seconds=60.0)
        run = account(run)
    assert run.counts["steps"] == 6 and run.seconds["full_steps"] == 0
