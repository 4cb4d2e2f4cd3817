"""Sending every step's losses to their owners: one packed flush every 16 steps against a gather in every step.

    python -m benchmarks.speed.exchange [--processes 2] [--batch 32] [--output exchange.json]

    ours        LossBuffer.record and step_done: a device copy per step; every 16 steps one asynchronous all-gather
    every step  all-gather of [index; loss] after each step, ``.cpu()``, scores[index] = loss in numpy, as in InfoBatch
    nothing     no exchange

Each step also does ``--work`` matrix products, which represent the model: without a host sync they keep a GPU's queue
full. The losses are computed on the device in each step. A time is that of a window of 16 steps, up to the end of its
device work; "ms/step" is the cost of a variant above "nothing". A rank's received bytes and collectives are counted.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import titan_attent.foundations.sharding
from benchmarks.common import measure
from titan_attent.losses.buffer import LossBuffer

NUM_EXAMPLES = 1_000_000


def work(mesh: DeviceMesh, device: str, batch: int, size: int, products: int, rounds: int) -> dict[str, Any]:
    """One rank. Returns, by variant, the seconds of the windows, and the bytes and collectives of one."""
    buffer = LossBuffer(NUM_EXAMPLES, mesh=mesh, device=device)
    window = buffer.flush_every
    generator = torch.Generator().manual_seed(mesh.get_local_rank())
    ids_of_step = torch.randint(0, NUM_EXAMPLES, (window, batch), generator=generator).to(device)
    factor = torch.randn(size, size, device=device)
    scores = np.zeros(NUM_EXAMPLES, dtype=np.float32)
    received = collectives = 0
    all_gather = titan_attent.foundations.sharding._all_gather

    def counted(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal received, collectives
        received += out.nbytes - x.nbytes
        collectives += 1
        return all_gather(out, x, *args, **kwargs)

    titan_attent.foundations.sharding._all_gather = counted

    def losses() -> Tensor:
        product = factor
        for _ in range(products):
            product = product @ factor
        return product[0, :batch].abs()

    first = 1  # step of the next window: a flush is at a multiple of ``window``

    def ours() -> None:
        nonlocal first
        for i in range(window):
            buffer.record(ids_of_step[i], losses(), step=first + i)
            buffer.step_done()
        first += window

    def every_step() -> None:
        for i in range(window):
            packed = torch.stack((ids_of_step[i].double(), losses().double()))
            out = packed.new_empty((mesh.size(), *packed.shape))
            counted(out.view(-1), packed.view(-1), group=mesh.get_group())
            gathered = out.cpu().numpy()
            scores[gathered[:, 0].astype(np.int64)] = gathered[:, 1]

    def nothing() -> None:
        for _ in range(window):
            losses()

    ways: dict[str, Callable[[], None]] = {"nothing": nothing, "ours": ours, "every step": every_step}
    times = measure.interleave(ways, rounds=rounds, device=device, before=dist.barrier)
    result: dict[str, Any] = {}
    for name, way in ways.items():
        received = collectives = 0
        way()
        result[name] = {
            "window_seconds": times[name],
            "steps": window,
            "received_bytes": received,
            "collectives": collectives,
        }
    buffer.sync()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed asynchronous exchange of losses against one in every step.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, help="default: all GPUs, or 2 on CPU")
    parser.add_argument("--batch", type=int, default=32, help="examples per rank and step")
    parser.add_argument("--work", type=int, default=8, help="matrix products per step")
    parser.add_argument("--size", type=int, help="size of the matrices (default: 4096 on a GPU, 64 on CPU)")
    parser.add_argument("--rounds", type=int, default=31, help="windows per variant")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.processes = args.processes or (torch.cuda.device_count() if args.device == "cuda" else 2)
    args.size = args.size or (4096 if args.device == "cuda" else 64)
    if args.batch > args.size:
        parser.error(f"--batch {args.batch}: at most --size {args.size}")

    header = measure.header()
    arguments = (args.device, args.batch, args.size, args.work, args.rounds)
    result = measure.run_ranks(work, *arguments, num_ranks=args.processes, device=args.device)
    rows = []
    for way, numbers in result.items():
        summary = measure.summary(numbers["window_seconds"])
        rows.append({"way": way, **numbers, **summary})
    shown = [
        {
            "way": row["way"],
            "ms/window": 1e3 * row["seconds"],
            "spread": f"{row['spread']:.0%}",
            "ms/step": 1e3 * (row["seconds"] - rows[0]["seconds"]) / row["steps"],
            "collectives": row["collectives"],
            "received bytes": row["received_bytes"],
        }
        for row in rows
    ]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
