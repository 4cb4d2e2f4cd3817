"""The step time of a pipeline with highway backpropagation against stock schedules, on CPU processes over gloo.

    python -m benchmarks.highway [--stages 4] [--microbatches 1 2 4] [--rounds 15] [--work sleep|compute]
                                 [--unit-ms F I W] [--output highway_pipeline.json]

    1F1B, GPipe            torch's; 1F1B also with fewer microbatches than stages, which torch refuses
    Interleaved1F1B, ZBV   torch's, two stages of half the cost per rank
    highway k              systems/highway/stagewise.py; k = P - 2 gives exact gradients, as do all stock schedules

A stage is two transformer layers (width 256, 256 tokens) with a microbatch of 2 rows. ``--work compute`` runs them;
this needs one core per stage. ``--work sleep`` sleeps instead, for ``--unit-ms`` or for the times that one process with
one thread needs (F forward, I input gradient, W the remaining backward). It shows the waiting and the messages of a
schedule as on a machine where the stages do not share cores. Messages have their real size.

"ms" is the median time of a step followed by a barrier. "simulated" is the time by simulator.py for the same units,
with the median of a measured message as ``send``. "x 1F1B" is the speed of a step relative to 1F1B. The schedules take
turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from benchmarks.common import measure
from benchmarks.highway import simulator
from benchmarks.highway.simulator import Costs
from titan_attent.systems.highway.stagewise import HighwaySchedule

WIDTH, LENGTH, ROWS, LAYERS = 256, 256, 2, 2
BASE = "1F1B"


class AnyNumber1F1B(Schedule1F1B):
    """torch's 1F1B, but it accepts fewer microbatches than stages."""

    def __init__(self, *args: Any, **kwargs: Any):
        PipelineScheduleSingle.__init__(self, *args, **kwargs)


# -- what a stage does ------------------------------------------------------------------------------------------------


class Through(torch.autograd.Function):
    """The identity in F seconds, its gradient in I seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class Sleeping(nn.Module):
    """h -> h + weight, whose gradient takes W seconds. The first stage computes input gradients, too: embeddings."""

    def __init__(self, costs: Costs, *, is_first: bool):
        super().__init__()
        self.costs = costs
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self.embedding = nn.Parameter(torch.zeros(WIDTH)) if is_first else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.embedding is None else x + self.embedding
        weight = Through.apply(self.weight, 0.0, self.costs.weight_gradient)
        return Through.apply(h, self.costs.forward, self.costs.input_gradient) + weight


def layers(num: int) -> nn.Module:
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True) for _ in range(num))
    )


def measured_costs(rounds: int) -> Costs:
    """The costs of a stage, measured in this process with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stage, x = layers(LAYERS), torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    y = stage(x)
    w = torch.randn_like(y)
    parts: dict[str, Callable[[], Any]] = {
        "forward": lambda: stage(x),
        "input": lambda: torch.autograd.grad(y, x, w, retain_graph=True),
        "both": lambda: torch.autograd.backward(y, w, retain_graph=True),
    }
    times = measure.interleave(parts, rounds=rounds, device="cpu")
    torch.set_num_threads(threads)
    f, i, b = (statistics.median(times[name]) for name in parts)
    return Costs(f, i, max(0.0, b - i))


# -- a rank -----------------------------------------------------------------------------------------------------------


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def work(
    mesh: DeviceMesh, kind: str, costs: Costs, numbers: list[int], rounds: int
) -> tuple[float, dict[int, dict[str, list[float]]]]:
    """One rank. Returns the seconds of a message, and of every step: microbatches -> schedule -> seconds."""
    rank, num_ranks, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def stages(per_rank: int, indices: tuple[int, ...]) -> list[Any]:
        num = per_rank * num_ranks
        share = Costs(
            costs.forward / per_rank, costs.input_gradient / per_rank, costs.weight_gradient / per_rank, costs.send
        )
        modules = [
            Sleeping(share, is_first=index == 0) if kind == "sleep" else layers(LAYERS // per_rank) for index in indices
        ]
        device = torch.device("cpu")
        return [PipelineStage(m, i, num, device, group=group) for m, i in zip(modules, indices, strict=True)]

    def schedules(num: int) -> dict[str, Any]:
        (one,) = stages(1, (rank,))
        stock: dict[str, Any] = {
            BASE: AnyNumber1F1B(one, num, loss_fn),
            "GPipe": ScheduleGPipe(one, num, loss_fn),
            "Interleaved1F1B": ScheduleInterleaved1F1B(stages(2, (rank, rank + num_ranks)), num, loss_fn),
            "ZBV": ScheduleZBVZeroBubble(stages(2, (rank, 2 * num_ranks - 1 - rank)), num, loss_fn),
        }
        return stock | {
            f"highway {k}": HighwaySchedule(stages(1, (rank,))[0], num, loss_fn, iterations=k)
            for k in range(num_ranks - 1)
        }

    def stepper(name: str, schedule: Any, num: int) -> Callable[[], None]:
        x = torch.randn(num * ROWS, LENGTH, WIDTH)
        first = (x,) if rank == 0 else ()
        ends_here = rank == (0 if name == "ZBV" else num_ranks - 1)

        def step() -> None:
            schedule.step(*first, target=x if ends_here else None, return_outputs=False)
            dist.barrier(group)

        return step

    send = message_seconds(mesh, rounds=50)
    times = {}
    for num in numbers:
        steppers = {name: stepper(name, schedule, num) for name, schedule in schedules(num).items()}
        times[num] = measure.interleave(steppers, rounds=rounds, device="cpu", before=lambda: dist.barrier(group))
    return send, times


def message_seconds(mesh: DeviceMesh, *, rounds: int) -> float:
    """Seconds of a message with one hidden state from rank 0 to rank 1: half of the median round trip."""
    x, times = torch.zeros(ROWS, LENGTH, WIDTH), []
    for _ in range(rounds):
        start = time.perf_counter()
        for sender in (0, 1):
            if mesh.get_local_rank() == sender:
                dist.send(x, 1 - sender)
            elif mesh.get_local_rank() == 1 - sender:
                dist.recv(x, sender)
        times.append((time.perf_counter() - start) / 2)
    dist.barrier()
    return statistics.median(times)


# -- the table --------------------------------------------------------------------------------------------------------


def simulated(num_stages: int, num: int, costs: Costs) -> dict[str, float]:
    """Schedule -> simulated seconds of a step."""
    orders = {
        BASE: simulator.one_f_one_b(num_stages, num, costs),
        "GPipe": simulator.gpipe(num_stages, num, costs),
        "Interleaved1F1B": simulator.interleaved(num_stages, num, costs),
        "ZBV": simulator.zbv(num_stages, num, costs),
    } | {f"highway {k}": simulator.highway(num_stages, num, costs, iterations=k) for k in range(num_stages - 1)}
    return {name: simulator.makespan(order, send=costs.send) for name, order in orders.items()}


def larger(counts: list[int], numbers: list[int]) -> list[dict[str, Any]]:
    """Simulated speed relative to 1F1B for larger pipelines, with F = I = W = 1 and free sends."""
    rows = []
    for num_stages in counts:
        for num in numbers:
            times = simulated(num_stages, num, Costs())
            shown = [BASE, "Interleaved1F1B", "ZBV", "highway 0", "highway 1", f"highway {num_stages - 2}"]
            names = ["1F1B, units", *shown[1:-1], "highway P-2"]
            ratios = [times[BASE], *(times[BASE] / times[name] for name in shown[1:])]
            rows.append({"stages": num_stages, "microbatches": num} | dict(zip(names, ratios, strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.highway",
        description="The step time of a pipeline with highway backpropagation against stock schedules.",
    )
    parser.add_argument("--stages", type=int, default=4, help="pipeline stages, one process each")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4], help="microbatches per step")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps per schedule")
    parser.add_argument("--work", choices=["sleep", "compute"], default="sleep", help="whether stages sleep or compute")
    parser.add_argument(
        "--unit-ms", type=float, nargs=3, metavar=("F", "I", "W"), help="milliseconds of F, I, W (default: measured)"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    header = measure.header()
    costs = Costs(*(ms / 1e3 for ms in args.unit_ms)) if args.unit_ms else measured_costs(args.rounds)
    arguments = (args.work, costs, args.microbatches, args.rounds)
    send, times = measure.run_ranks(work, *arguments, num_ranks=args.stages, device="cpu")
    costs = Costs(costs.forward, costs.input_gradient, costs.weight_gradient, send)
    rows, shown = [], []
    for num, by_schedule in times.items():
        predicted = simulated(args.stages, num, costs)
        base = measure.summary(by_schedule[BASE])["seconds"]
        for name, seconds in by_schedule.items():
            summary = measure.summary(seconds)
            exact = not name.startswith("highway") or name == f"highway {args.stages - 2}"
            rows.append({"microbatches": num, "schedule": name, "simulated": predicted[name], "times": seconds})
            rows[-1] |= summary
            shown.append(
                {
                    "microbatches": num,
                    "schedule": name,
                    "exact": "yes" if exact else "no",
                    "ms": f"{1e3 * summary['seconds']:.1f}",
                    "spread": f"{summary['spread']:.0%}",
                    "simulated": f"{1e3 * predicted[name]:.1f}",
                    "x 1F1B": f"{base / summary['seconds']:.2f}",
                    "simulated x 1F1B": f"{predicted[BASE] / predicted[name]:.2f}",
                }
            )
    units = {name: 1e3 * value for name, value in vars(costs).items()}
    more = larger([4, 8, 16], [1, 2, 4, 8, 16])
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    print(f"ms per stage and microbatch, and per message: { {k: round(v, 2) for k, v in units.items()} }")
    result = header | {"settings": settings, "units_ms": units, "rows": rows, "simulated_only": more}
    measure.publish(args.output, result, shown, more)


if __name__ == "__main__":
    main()
