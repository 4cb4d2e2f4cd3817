"""Exact top-k over sharded scores against gathering them: seconds, bytes moved, peak memory.

    python benchmarks/selection.py [--sizes 1000000 10000000 100000000] [--processes 2] [--output selection.json]

N scores are sharded over the processes; both ways draw the same keys (Gumbel noise, floor) and choose the same half:

    ours     select_top_k (radix descent: 4 all-reduces of 256 counts, one all-gather of a count), bitmask for all ranks
    gather   all-gather of the N fp32 keys, torch.topk on every rank

"received" counts the payload that reaches a rank in ring algorithms: 2 (W - 1) / W of an all-reduce, (W - 1) / W of
what an all-gather returns. "MiB" is the growth of a rank's resident memory (CPU) or of its CUDA allocations at the peak
of a stage over what it held when the stage began. The choices are compared; where they differ, ties at the threshold
apart, the benchmark fails. 10^8 on two CPU processes needs 8 GiB and two minutes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import titan_attent.sharding
from titan_attent.sharding import ExampleSharding
from titan_attent.teacher.selection import (
    floor_log_probabilities,
    gather_bitmask,
    log_probabilities,
    select_top_k,
    soft_keys,
)

FLOOR = 0.05
SEED = (0, 1, 0)
KEYS = ("seconds", "received_bytes")


class Traffic:
    """Counts what the collectives of sharding.py bring to this rank, in bytes."""

    def __init__(self) -> None:
        self.received = 0
        size = dist.get_world_size()
        all_reduce, all_gather = dist.all_reduce, titan_attent.sharding._all_gather

        def counted_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.received += 2 * (size - 1) * x.nbytes // size
            return all_reduce(x, *args, **kwargs)

        def counted_gather(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.received += out.nbytes - x.nbytes
            return all_gather(out, x, *args, **kwargs)

        dist.all_reduce = counted_reduce
        titan_attent.sharding._all_gather = counted_gather


class Stages:
    """Seconds, received bytes and peak memory of named stages, on this rank."""

    def __init__(self, device: str, traffic: Traffic):
        self.device, self.traffic = device, traffic
        self.rows: dict[str, dict[str, list[float]]] = {}

    def __call__(self, name: str, fn: Callable[[], Any]) -> Any:
        dist.barrier()
        received = self.traffic.received
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            measure.reset_peak_rss()
            before = measure.rss_bytes(peak=False)
        result: list[Any] = []
        elapsed = measure.seconds(lambda: result.append(fn()), device=self.device)
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else measure.rss_bytes(peak=True)
        row = self.rows.setdefault(name, {"seconds": [], "received": [], "peak": []})
        row["seconds"].append(elapsed)
        row["received"].append(self.traffic.received - received)
        row["peak"].append(peak - before)
        return result[0]


def scores_of_keys(keys: Tensor) -> Tensor:
    """The fp32 scores with these keys: the inverse of ``ordered_keys``, and what a gathering way would send."""
    bits = torch.where(keys >= 1 << 31, keys - (1 << 31), 0xFFFFFFFF - keys)
    return bits.to(torch.int32).view(torch.float32)


def work(mesh: DeviceMesh, device: str, num_examples: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """One rank: both ways in turns; returns rank 0's numbers."""
    sharding = ExampleSharding(num_examples, mesh=mesh)
    generator = torch.Generator(device).manual_seed(sharding.rank)
    scores = torch.empty(sharding.num_local, device=device).normal_(3.0, 0.7, generator=generator)  # as losses
    ids, k = sharding.local_ids(device), num_examples // 2
    stages = Stages(device, Traffic())

    def draw() -> Tensor:
        phi = log_probabilities(scores, temperature=1.0, normalization="softmax")
        phi = floor_log_probabilities(phi, k=k, minimum=FLOOR, sharding=sharding)
        return soft_keys(phi, ids=ids, seed=SEED)

    def ours(keys: Tensor) -> Tensor:
        chosen, _ = stages("ours: threshold and choice", lambda: select_top_k(keys, k=k, sharding=sharding))
        stages("ours: bitmask to all ranks", lambda: gather_bitmask(chosen, sharding=sharding))
        return chosen

    def gather(keys: Tensor) -> Tensor:
        noisy = scores_of_keys(keys)

        def top() -> Tensor:
            everywhere, _ = sharding.gather(noisy)
            return torch.topk(everywhere.view(-1), k).indices

        indices = stages("gather: all-gather, torch.topk", top)
        chosen = torch.zeros(sharding.chunk * sharding.size, dtype=torch.bool, device=device)
        chosen[indices] = True
        return chosen[sharding.start : sharding.stop]

    for i in range(-1, rounds):
        keys = stages("keys: floor and noise", draw)
        found = {way.__name__: way(keys) for way in ((ours, gather) if i % 2 else (gather, ours))}
        if keys[found["ours"] != found["gather"]].unique().numel() > 1:
            raise RuntimeError(f"N = {num_examples}: the two ways chose different examples")
        if i < 0:
            stages.rows.clear()  # warm-up
    return stages.rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact sharded top-k against all-gather and torch.topk.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="multiples of --processes")
    parser.add_argument("--processes", type=int, help="default: all GPUs, or 2 on CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.processes = args.processes or (torch.cuda.device_count() if args.device == "cuda" else 2)
    if any(size % args.processes for size in args.sizes):
        parser.error(f"--sizes {args.sizes}: give multiples of the {args.processes} processes")

    header, rows = measure.header(), []
    for size in args.sizes:
        stages = measure.run_ranks(work, args.device, size, args.rounds, num_ranks=args.processes, device=args.device)
        for name, numbers in stages.items():
            memory = {"received_bytes": int(numbers["received"][0]), "peak_bytes": int(max(numbers["peak"]))}
            rows.append({"examples": size, "stage": name, **measure.summary(numbers["seconds"]), **memory})
        mine = [row for row in rows if row["examples"] == size]
        (theirs,) = (row for row in mine if row["stage"].startswith("gather"))
        ours = {key: sum(row[key] for row in mine if row["stage"].startswith("ours")) for key in theirs if key in KEYS}
        threshold = next(row for row in mine if row["stage"].startswith("ours: threshold"))
        print(
            f"N = {size:,}: {theirs['seconds'] / ours['seconds']:.1f} times faster; bytes: "
            f"{theirs['received_bytes'] / max(1, threshold['received_bytes']):,.0f} times fewer for the threshold, "
            f"{theirs['received_bytes'] / max(1, ours['received_bytes']):.1f} with the bitmask",
            flush=True,
        )
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    shown = [
        {
            "N": row["examples"],
            "stage": row["stage"],
            "seconds": row["seconds"],
            "spread": f"{row['spread']:.0%}",
            "received bytes": row["received_bytes"],
            "MiB": row["peak_bytes"] // 2**20,
        }
        for row in rows
    ]
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
