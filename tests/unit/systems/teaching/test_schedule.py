"""schedule.py: ends, order and integer laws of ratio, interval and selection size."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_attent.systems.teaching.schedule import adaptive_ratio, interval_at, progress, ratio_at, selection_size

SHARE = st.floats(0, 1)
RATIO = st.floats(0.001, 1)


@given(st.integers(0, 1000), st.integers(0, 500), st.integers(1, 1000))
def test_progress_is_the_share_of_the_steps_after_the_warmup(step, warmup_steps, total_steps):
    value = progress(step, warmup_steps=warmup_steps, total_steps=total_steps)
    if step <= warmup_steps:
        assert value == 0
    elif step >= total_steps:
        assert value == 1
    else:
        assert value == pytest.approx(float(Fraction(step - warmup_steps, total_steps - warmup_steps)))


@pytest.mark.parametrize("schedule", ["constant", "incremental", "cosine"])
@given(SHARE, SHARE, RATIO, RATIO)
def test_ratio_runs_monotonically_from_initial_to_final(schedule, a, b, initial, final):
    a, b = sorted((a, b))
    early, late = (ratio_at(p, schedule=schedule, initial=initial, final=final) for p in (a, b))
    start, end = (ratio_at(p, schedule=schedule, initial=initial, final=final) for p in (0.0, 1.0))
    assert start == pytest.approx(initial)
    assert end == pytest.approx(initial if schedule == "constant" else final)
    slack = 1e-12
    assert (early <= late + slack) if end >= start else (early >= late - slack)
    assert min(start, end) - slack <= early <= max(start, end) + slack


def test_ratio_between_the_ends():
    quarter = {name: ratio_at(0.25, schedule=name, initial=0.2, final=0.8) for name in ("incremental", "cosine")}
    assert quarter["incremental"] == pytest.approx(0.35)
    assert quarter["cosine"] == pytest.approx(0.2 + 0.6 * (1 - math.sqrt(0.5)) / 2)
    assert ratio_at(0.5, schedule="cosine", initial=0.2, final=0.8) == pytest.approx(0.5)


@given(SHARE, RATIO, RATIO)
def test_the_adaptive_ratio_is_the_share_squared_within_its_ends(share, a, b):
    lowest, highest = sorted((a, b))
    wanted = share**2 if share**2 < 0.7 else 1.0
    assert adaptive_ratio(share, lowest=lowest, highest=highest) == sorted((lowest, wanted, highest))[1]


@given(SHARE, st.integers(1, 5), st.integers(0, 5))
def test_interval_is_the_nearest_whole_number_on_the_line(p, initial, more):
    maximum = initial + more
    assert interval_at(p, schedule="fixed", initial=initial, maximum=maximum) == initial
    interval = interval_at(p, schedule="incremental", initial=initial, maximum=maximum)
    assert isinstance(interval, int) and initial <= interval <= maximum
    assert abs(interval - (initial + more * p)) <= 0.5 + 1e-9
    assert interval_at(1.0, schedule="incremental", initial=initial, maximum=maximum) == maximum


@given(st.integers(1, 100_000), RATIO, st.data())
def test_selection_is_the_largest_multiple_of_the_batch_up_to_ratio_times_n(num_examples, ratio, data):
    batch_size = data.draw(st.integers(1, min(num_examples, 512)))
    k = selection_size(num_examples, ratio=ratio, batch_size=batch_size)
    wanted = round(ratio * num_examples)
    assert k == max([batch_size, *range(0, wanted + 1, batch_size)])
    assert k % batch_size == 0 and batch_size <= k <= num_examples


def test_a_ratio_of_one_selects_all_full_batches():
    assert selection_size(101, ratio=1.0, batch_size=12) == 96
    assert selection_size(96, ratio=1.0, batch_size=12) == 96
    assert selection_size(10**10, ratio=0.5, batch_size=4096) == 5 * 10**9 // 4096 * 4096
