"""The messages of a step between stages, in the order in which NCCL processes them.

No rank deadlocks, and no stage waits for a message that it does not need.

The schedule's own code runs on stages that only record its calls. A model of NCCL then executes the programs of all
ranks. A rank's computations are one queue and its batched messages another, each in the order of the calls
(ProcessGroupNCCL::pointToPoint: one stream for all batches of a device). A message also waits for the computations that
the rank queued before it, and for its partner. Forward, input gradients and weight gradients take one second each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleGPipe

from benchmarks.highway import simulator
from titan_attent.systems.highway import stagewise
from titan_attent.systems.highway.stagewise import HighwaySchedule, num_rounds


class Message(NamedTuple):
    """``kind``: "f" or "b". ``number``: index among the messages of this kind and microbatch between the two ranks."""

    source: int
    target: int
    kind: str
    microbatch: int
    number: int


class RecordedStage:
    """A stage that records ``program``: ("compute", seconds), ("message", message) and ("wait", message)."""

    def __init__(self, p: int, num_stages: int):
        self.stage_index, self.num_stages = p, num_stages
        self.is_first, self.is_last = p == 0, p == num_stages - 1
        self.submod: Any = torch.nn.Identity()
        self.program: list[tuple[str, Any]] = []
        self.has_backward = True
        x = torch.zeros(1, requires_grad=True)
        self.fwd_cache = dict.fromkeys(range(64), ((x * 1,), [x]))
        self.bwd_cache: dict[int, Any] = dict.fromkeys(range(64))
        self.grad_recv_info: dict[int, Any] = dict.fromkeys(range(64), (Buffer(),))
        self._numbers: dict[Any, int] = {}

    def _message(self, source: int, target: int, kind: str, i: int) -> list[Message]:
        key = (source, target, kind, i)
        self._numbers[key] = number = self._numbers.get(key, -1) + 1
        return [Message(*key, number)]

    def get_fwd_recv_ops(self, i: int) -> list[Message]:
        return [] if self.is_first else self._message(self.stage_index - 1, self.stage_index, "f", i)

    def get_fwd_send_ops(self, i: int) -> list[Message]:
        return [] if self.is_last else self._message(self.stage_index, self.stage_index + 1, "f", i)

    def get_bwd_recv_ops(self, i: int) -> list[Message]:
        return [] if self.is_last else self._message(self.stage_index + 1, self.stage_index, "b", i)

    def get_bwd_send_ops(self, i: int) -> list[Message]:
        return [] if self.is_first else self._message(self.stage_index, self.stage_index - 1, "b", i)

    def _retrieve_recv_grads(self, i: int) -> tuple[torch.Tensor]:
        return (torch.zeros(1),)

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        self.program.append(("compute", 1.0))

    def backward_one_chunk(self, i: int, full_backward: bool = True, **kwargs: Any) -> None:
        self.program.append(("compute", 2.0 if full_backward else 1.0))

    def backward_weight_one_chunk(self, i: int, **kwargs: Any) -> None:
        self.program.append(("compute", 1.0))

    def perform_reduce_grad(self, factor: int) -> None:
        pass


class Buffer:
    buffer = None


Program = list[tuple[str, Any]]


def programs(num_stages: int, num: int, rounds: int | None, monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs of all ranks; those of GPipe if ``rounds`` is None."""
    found = []
    for p in range(num_stages):
        stage = RecordedStage(p, num_stages)
        add = stage.program.append

        def post(messages: list[Message], add: Callable[..., None] = add, **kwargs: Any) -> list[Message]:
            for message in messages:
                add(("message", message))
            return messages

        def wait(messages: list[Message], add: Callable[..., None] = add) -> None:
            for message in messages:
                add(("wait", message))

        schedule: Any = object.__new__(HighwaySchedule)
        schedule._stage, schedule._n_microbatches, schedule._has_backward = stage, num, True
        schedule.exact, schedule.rounds, schedule.scale_grads = False, rounds, False
        for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
            setattr(schedule, name, lambda *args: None)
        schedule._check_inputs = lambda args, kwargs, *rest: ([()] * num, [{}] * num)

        def input_gradient(i: int, w: Any, add: Callable[..., None] = add) -> Any:
            add(("compute", 1.0))
            return w

        schedule._input_gradient = input_gradient
        monkeypatch.setattr(stagewise, "_batch_p2p", post)
        monkeypatch.setattr(stagewise, "_wait_batch_p2p", wait)
        if rounds is None:
            gpipe(stage, num, post, wait)
        else:
            schedule._step_microbatches()
        found.append(stage.program)
    return found


def gpipe(stage: RecordedStage, num: int, post: Any, wait: Any) -> None:
    """The order of torch's ScheduleGPipe: one receive at a time, sends immediately."""
    for i in range(num):
        wait(post(stage.get_fwd_recv_ops(i)))
        stage.forward_one_chunk(i)
        post(stage.get_fwd_send_ops(i))
    for i in range(num):
        wait(post(stage.get_bwd_recv_ops(i)))
        stage.backward_one_chunk(i)
        post(stage.get_bwd_send_ops(i))


def seconds(ranks: list[Program]) -> float:
    """The seconds of a step; AssertionError if ranks deadlock."""
    computing: list[Program] = [[op for op in program if op[0] != "message"] for program in ranks]
    talking: list[list[tuple[Message, int]]] = []
    for program in ranks:
        behind, messages = 0, []
        for kind, what in program:
            if kind == "message":
                messages.append((what, behind))
            else:
                behind += 1
        talking.append(messages)
    arrived: dict[Message, float] = {}
    ends: list[list[float]] = [[] for _ in ranks]
    clocks, heads = [0.0] * len(ranks), [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for p, operations in enumerate(computing):
            while len(ends[p]) < len(operations):
                kind, what = operations[len(ends[p])]
                before = ends[p][-1] if ends[p] else 0.0
                if kind == "wait":
                    if what not in arrived:
                        break
                    ends[p].append(max(before, arrived[what]))
                else:
                    ends[p].append(before + what)
                moved = True
        for p in range(len(ranks)):
            if heads[p] == len(talking[p]):
                continue
            message, _ = talking[p][heads[p]]
            pair = [message.source, message.target]
            at_head = all(heads[q] < len(talking[q]) and talking[q][heads[q]][0] == message for q in pair)
            if not at_head or any(talking[q][heads[q]][1] > len(ends[q]) for q in pair):
                continue
            behind = [talking[q][heads[q]][1] for q in pair]
            ready = [ends[q][n - 1] if n else 0.0 for q, n in zip(pair, behind, strict=True)]
            arrived[message] = max(*ready, *(clocks[q] for q in pair))
            for q in pair:
                clocks[q] = arrived[message]
                heads[q] += 1
            moved = True
    assert all(len(e) == len(c) for e, c in zip(ends, computing, strict=True)), "ranks wait for each other"
    assert all(head == len(messages) for head, messages in zip(heads, talking, strict=True)), "ranks wait"
    return max(end[-1] for end in ends)


SIZES = [(p, n) for p in (2, 3, 4, 8) for n in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("num_stages, num", SIZES)
def test_no_round_fills_and_drains_as_fast_as_it_can(
    num_stages: int, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage starts after P - 1 forwards and works three seconds per microbatch; a single one takes P + 3."""
    found = seconds(programs(num_stages, num, 0, monkeypatch))
    assert found == max(num_stages - 1 + 3 * num, num_stages + 3)
    assert found <= seconds(programs(num_stages, num, None, monkeypatch)) == 3 * (num_stages + num - 1)


@pytest.mark.parametrize("num_stages, num", SIZES)
def test_the_order_of_messages_costs_nothing(num_stages: int, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every number of rounds the time is that without ordered messages: docs/results/highway_pipeline.md."""
    for k in range(num_rounds(num_stages, -1) + 1):
        found = seconds(programs(num_stages, num, k, monkeypatch))
        assert found == simulator.makespan(simulator.highway(num_stages, num, simulator.Costs(), iterations=k)), k


def test_the_stage_is_torchs() -> None:
    """The recorded methods exist in torch's stage and schedule."""
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        assert hasattr(PipelineStage, name) and hasattr(RecordedStage, name)
    for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses", "_check_inputs"):
        assert hasattr(ScheduleGPipe, name)


def test_the_model_distinguishes_other_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """If all stages post all receives first, it is slower than GPipe. If none does, the last two stages deadlock."""
    ranks = programs(8, 8, 0, monkeypatch)
    assert (seconds(ranks), seconds(programs(8, 8, None, monkeypatch))) == (31, 45)

    def arrives(op: tuple[str, Any], p: int) -> bool:
        return op[0] == "message" and op[1].kind == "f" and op[1].target == p

    ahead = [sorted(program, key=lambda op, p=p: not arrives(op, p)) for p, program in enumerate(ranks)]  # type: ignore
    assert seconds(ahead) == 49
    last = [op for op in ranks[-1] if not arrives(op, 7)]
    one_by_one = [step for op in last for step in ([("message", op[1]), op] if op[0] == "wait" else [op])]
    with pytest.raises(AssertionError, match="wait"):
        seconds([*ranks[:-1], one_by_one])
