"""The simulated time of a pipeline step, from each rank's ordered list of operations and their dependencies.

A rank does its operations in order, one at a time. An operation that needs another rank's result starts at least
``send`` seconds after that is ready. Sends take no time of the ranks and do not share a link. With S stages on P ranks,
a stage has P / S of the cost of one of P stages. The orders of the stock schedules are torch's own. Those of 1F1B and
GPipe are written out here, as torch's classes refuse fewer microbatches than stages. Highway's order is that of
systems/highway/stagewise.py.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from titan_attent.systems.highway.stagewise import num_rounds, span


@dataclass(frozen=True)
class Costs:
    """Seconds of one of P stages with one microbatch, and of a send."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    send: float = 0.0


class Key(NamedTuple):
    """``kind``: "F", "I" (input gradient of a round), "W", "B" (both), "w" (the gradient of a round has arrived)."""

    kind: str
    stage: int
    microbatch: int
    round: int = 0


@dataclass(frozen=True)
class Operation:
    """An operation. ``after``: the operations, of any rank, that must have ended before it starts."""

    key: Key
    seconds: float
    after: tuple[Key, ...] = ()


Order = list[list[Operation]]
"""The operations of each rank, in order."""


def makespan(order: Order, *, send: float = 0.0) -> float:
    """Seconds from the first start to the last end.

    Raises:
        ValueError: the ranks wait for each other forever.
    """
    ends: dict[Key, tuple[float, int]] = {}
    clocks, positions = [0.0] * len(order), [0] * len(order)
    while any(position < len(operations) for position, operations in zip(positions, order, strict=True)):
        moved = False
        for rank, operations in enumerate(order):
            while positions[rank] < len(operations) and all(key in ends for key in operations[positions[rank]].after):
                operation = operations[positions[rank]]
                ready = [end + (send if where != rank else 0.0) for end, where in (ends[k] for k in operation.after)]
                clocks[rank] = max([clocks[rank], *ready]) + operation.seconds
                ends[operation.key] = clocks[rank], rank
                positions[rank] += 1
                moved = True
        if not moved:
            raise ValueError(f"ranks wait for each other after {len(ends)} operations")
    return max(clocks)


def one_f_one_b(num_stages: int, num: int, costs: Costs) -> Order:
    """First as many forwards as stages from this one on, then alternately one backward and one forward."""
    return [_stock(_alternating(p, num, min(num, num_stages - p)), num_stages, costs, 1) for p in range(num_stages)]


def gpipe(num_stages: int, num: int, costs: Costs) -> Order:
    return [_stock(_alternating(p, num, num), num_stages, costs, 1) for p in range(num_stages)]


def interleaved(num_ranks: int, num: int, costs: Costs) -> Order:
    """Interleaved 1F1B, two stages per rank."""
    return _from_torch(ScheduleInterleaved1F1B, num_ranks, num, costs)


def zbv(num_ranks: int, num: int, costs: Costs) -> Order:
    """Zero bubble in the shape of a V, two stages per rank; exact gradients."""
    return _from_torch(ScheduleZBVZeroBubble, num_ranks, num, costs)


def highway(num_stages: int, num: int, costs: Costs, *, iterations: int) -> Order:
    """All stages' backward at once; exact with ``iterations = num_stages - 2``."""
    k, top = num_rounds(num_stages, iterations), num_stages - 1
    f, i, w = costs.forward, costs.input_gradient, costs.weight_gradient
    order: Order = []
    for p in range(num_stages):
        operations: list[Operation] = []
        for mb in range(num):
            operations.append(Operation(Key("F", p, mb), f, (Key("F", p - 1, mb),) if p else ()))
            if p == top:
                operations.append(Operation(Key("I", p, mb), i))
        for mb in range(num):
            if p == top:
                operations.append(Operation(Key("W", p, mb), w))
                continue
            first, last = span(p, num_stages, k)
            for m in range(first, last + 1):
                operations.append(Operation(Key("w", p, mb, m), 0.0, _sources(p, mb, m, num_stages)))
                if m < last:
                    operations.append(Operation(Key("I", p, mb, m), i))
            if p > 0 and last == num_stages - 2 - p < k:
                operations += [Operation(Key("I", p, mb, last), i), Operation(Key("W", p, mb), w)]
            else:
                operations.append(Operation(Key("B", p, mb), i + w))
        order.append(operations)
    return order


def _sources(p: int, mb: int, m: int, num_stages: int) -> tuple[Key, ...]:
    """The operations on stage p + 1 that produce the message with w^m_p."""
    if p + 1 == num_stages - 1:
        return (Key("I", p + 1, mb),)
    exact = num_stages - 3 - p
    made = (Key("I", p + 1, mb, m - 1),) if m > 0 else ()
    return made + ((Key("w", p + 1, mb, m),) if m <= exact else ())


def _alternating(p: int, num: int, ahead: int) -> list[tuple[str, int, int]]:
    actions = [("F", p, mb) for mb in range(ahead)]
    for mb in range(num):
        actions.append(("B", p, mb))
        if ahead + mb < num:
            actions.append(("F", p, ahead + mb))
    return actions


def _stock(actions: list[tuple[str, int, int]], num_stages: int, costs: Costs, share: float) -> list[Operation]:
    """F waits for the previous stage, B and I for the next one; a B has the key "I", too, for its input gradient."""
    f, i, w = costs.forward * share, costs.input_gradient * share, costs.weight_gradient * share
    operations = []
    for kind, stage, mb in actions:
        if kind == "F":
            operations.append(Operation(Key("F", stage, mb), f, (Key("F", stage - 1, mb),) if stage else ()))
        elif kind == "W":
            operations.append(Operation(Key("W", stage, mb), w, (Key("I", stage, mb),)))
        else:
            behind = (Key("I", stage + 1, mb),) if stage + 1 < num_stages else ()
            after = (Key("F", stage, mb), *behind)
            operations.append(Operation(Key("I", stage, mb), i + w if kind == "B" else i, after))
    return operations


def _from_torch(schedule: type[PipelineScheduleMulti], num_ranks: int, num: int, costs: Costs) -> Order:
    """The order in ``pipeline_order``, which torch's classes compute from the numbers of their stages."""
    num_stages = 2 * num_ranks
    stages: list[Any] = [
        SimpleNamespace(
            **{"stage_index": index, "num_stages": num_stages, "group_size": num_ranks, "group_rank": 0},
            **{"is_first": index == 0, "is_last": index == num_stages - 1, "submod": nn.Identity(), "device": "cpu"},
        )
        for index in (0, num_ranks if schedule is ScheduleInterleaved1F1B else num_stages - 1)
    ]
    order = schedule(stages, num).pipeline_order
    lists = [
        [(a.computation_type.value, a.stage_index, a.microbatch_index or 0) for a in order[rank] if a is not None]
        for rank in range(num_ranks)
    ]
    return [_stock([a for a in actions if a[0] in "FBIW"], num_stages, costs, 0.5) for actions in lists]
