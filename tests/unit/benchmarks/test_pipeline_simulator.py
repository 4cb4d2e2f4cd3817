"""The pipeline simulator, where the time of a step is known in closed form."""

import pytest

from benchmarks.highway.simulator import (
    Costs,
    Key,
    Operation,
    gpipe,
    highway,
    interleaved,
    makespan,
    one_f_one_b,
    zbv,
)

SEND = Costs(send=0.125)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("num", [1, 2, 4, 9])
def test_1f1b_and_gpipe_take_the_microbatches_and_the_stages_once(num_stages: int, num: int) -> None:
    for order in (one_f_one_b, gpipe):
        assert makespan(order(num_stages, num, Costs())) == 3 * (num + num_stages - 1)
        assert makespan(order(num_stages, num, Costs(1, 2, 4))) == 7 * (num + num_stages - 1)
    with_sends = makespan(gpipe(num_stages, num, SEND), send=0.125)
    assert with_sends == 3 * (num + num_stages - 1) + 2 * (num_stages - 1) * 0.125


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8, 16])
def test_highway_with_one_microbatch(num_stages: int) -> None:
    """P forwards, the last stage's input gradient, k of all at once, and both; no round costs a send."""
    for k in range(num_stages - 1):
        order = highway(num_stages, 1, Costs(), iterations=k)
        assert makespan(order) == num_stages + k + 3
        assert makespan(order, send=0.125) == num_stages + k + 3 + 2 * (num_stages - 1) * 0.125
        uneven = highway(num_stages, 1, Costs(1, 2, 4), iterations=k)
        assert makespan(uneven) == num_stages + 2 * (k + 2) + 4


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_highway_with_all_rounds_does_the_work_of_backpropagation(num_stages: int) -> None:
    for operations in highway(num_stages, 3, Costs(), iterations=-1):
        assert sum(operation.seconds for operation in operations) <= 3 * 3
    assert makespan(highway(num_stages, 1, Costs(), iterations=-1)) == 2 * num_stages + 1


@pytest.mark.parametrize("num", [2, 4, 8])
def test_highway_without_rounds_is_bound_by_the_work_of_its_last_stage(num: int) -> None:
    assert makespan(highway(4, num, Costs(), iterations=0)) == 3 + 3 * num


def test_interleaved_and_zbv_with_one_microbatch() -> None:
    """Nothing to fill a bubble with: a forward and a backward pass; ZBV leaves the weight gradients behind."""
    assert makespan(interleaved(4, 1, Costs())) == 3 * 4
    assert 2 * 4 < makespan(zbv(4, 1, Costs())) <= 3 * 4


@pytest.mark.parametrize("num", [8, 16])
def test_with_many_microbatches_the_stock_schedules_are_near_the_work(num: int) -> None:
    """Interleaving halves the bubble of (P - 1) x 3, ZBV has none."""
    assert makespan(interleaved(4, num, Costs())) == 3 * num + 3 * 3 / 2
    assert 3 * num < makespan(zbv(4, num, Costs())) <= 3 * num + 3


def test_ranks_that_wait_for_each_other() -> None:
    one, other = Key("F", 0, 0), Key("F", 1, 0)
    with pytest.raises(ValueError, match="wait for each other"):
        makespan([[Operation(one, 1.0, (other,))], [Operation(other, 1.0, (one,))]])
