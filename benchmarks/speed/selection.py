"""Whole draws over sharded losses against gathering the scores: seconds, collectives, bytes moved, peak memory.

    python -m benchmarks.speed.selection [--sizes 1000000 10000000 100000000] [--processes 2] [--output selection.json]

A loss buffer of N synthetic losses is sharded over the processes. Both variants make the same draw from it
(soft, ratio 0.5, floor, quarantine, effective sample size, weights, audit), and then the first batch of the pass:

    ours     draw        Draws.draw: radix descents over sharded scores
             turn-over   Draws.selected (a bitmask to all ranks), the pass, the first batch's ids and weights
    gather   draw        all-gather of the N fp32 scores; torch.kthvalue and plain sums on every rank for clipping,
                         quarantine and audit; all-gather of each rank's keys; torch.topk, unsorted, which takes a
                         third of the time of the sorted one; weights of a rank's own examples
             turn-over   the same from the mask of the selected examples, which every rank already has

"received" counts the payload that reaches a rank in ring algorithms: 2 (W - 1) / W of an all-reduce, (W - 1) / W of the
output of an all-gather. "MiB" is the peak of a rank's resident memory (CPU) or CUDA allocations during a stage, minus
the value at its start. Selections, weights and statistics are compared: where they differ by more than rounding, the
benchmark fails. 10^8 on two CPU processes needs 12 GiB, and half a minute to a minute per round; the first round is
warm-up.
"""

import argparse
import ctypes
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
from titan_attent.data.plan.order import Pass, Pool, SelectedSlots
from titan_attent.foundations.counter_rng import derive_key, gumbel, stream
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.job_config import TeacherConfig
from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching.draws import Draws
from titan_attent.systems.teaching.importance import importance
from titan_attent.systems.teaching.radix import blocks
from titan_attent.systems.teaching.selection import lowest_log_probability
from titan_attent.systems.teaching.statistics import QUANTILE
from titan_attent.systems.teaching.weights import inclusion_probabilities

RATIO, BATCH, STEP = 0.5, 1024, 5000
CONFIG = TeacherConfig(strategy="hard")
Numbers = dict[str, float]


class Traffic:
    """Counts the collectives of foundations/sharding.py, and the bytes that this rank receives from them."""

    def __init__(self) -> None:
        self.received = self.calls = 0
        size = dist.get_world_size()
        all_reduce, all_gather = dist.all_reduce, titan_attent.foundations.sharding._all_gather

        def counted_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.received += 2 * (size - 1) * x.nbytes // size
            return all_reduce(x, *args, **kwargs)

        def counted_gather(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.received += out.nbytes - x.nbytes
            return all_gather(out, x, *args, **kwargs)

        dist.all_reduce = counted_reduce
        titan_attent.foundations.sharding._all_gather = counted_gather


class Stages:
    """Seconds, collectives, received bytes and peak memory of named stages, on this rank."""

    def __init__(self, device: str, traffic: Traffic):
        self.device, self.traffic = device, traffic
        self.rows: dict[str, dict[str, list[float]]] = {}

    def __call__(self, name: str, fn: Callable[[], Any]) -> Any:
        dist.barrier()
        calls, received = self.traffic.calls, self.traffic.received
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            give_back_memory()
            measure.reset_peak_rss()
            before = measure.rss_bytes(peak=False)
        result: list[Any] = []
        elapsed = measure.seconds(lambda: result.append(fn()), device=self.device)
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else measure.rss_bytes(peak=True)
        row = self.rows.setdefault(name, {"seconds": [], "collectives": [], "received": [], "peak": []})
        row["seconds"].append(elapsed)
        row["collectives"].append(self.traffic.calls - calls)
        row["received"].append(self.traffic.received - received)
        row["peak"].append(peak - before)
        return result[0]


def give_back_memory() -> None:
    """Return freed memory that the C library keeps: it would hide the need of the next stage."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def filled_buffer(mesh: DeviceMesh, device: str, num_examples: int) -> LossBuffer:
    """A buffer with two recorded losses of every example, as after a warm-up and some rounds."""
    buffer = LossBuffer(num_examples, mesh=mesh, device=device)
    generator = torch.Generator(device).manual_seed(buffer.sharding.rank)
    buffer.first_loss.normal_(8.0, 0.5, generator=generator)
    buffer.loss.normal_(3.0, 0.7, generator=generator)
    buffer.first_step.random_(1, 1000, generator=generator)
    buffer.step.random_(1000, STEP, generator=generator)
    buffer.visits.fill_(3)
    return buffer


class Gathering:
    """The alternative: every rank gathers all scores and computes the draw itself. Every example has a loss."""

    def __init__(self, buffer: LossBuffer):
        self.buffer, self.sharding = buffer, buffer.sharding
        n = self.sharding.num_local
        self.streak = torch.zeros(n, dtype=torch.int32, device=buffer.device)
        self.start = torch.zeros(n, device=buffer.device)
        self.last_draw = torch.full((n,), -1, dtype=torch.int32, device=buffer.device)
        self.weights = torch.zeros(n, device=buffer.device)
        self.num_draws = 0

    def draw(self, *, seed: tuple[int, ...]) -> Numbers:
        sharding, own = self.sharding, slice(self.sharding.start, self.sharding.stop)
        n = sharding.num_examples
        local = importance(self.buffer.records(), name=CONFIG.importance)
        scores = sharding.gather(local)[0].view(-1)[:n]
        ranks = (max(1, int(QUANTILE * n)), max(1, n // 100), n - n // 100, 1 + n // 100)  # by descending score
        watched, p99, low, high = (float(torch.kthvalue(scores, n - rank + 1).values) for rank in ranks)
        self._count(local, watched)
        clipped = scores.clamp(low, high)
        numbers = {"mean": float(scores.double().mean()), "share": share(scores), "p99": p99}
        assert share(clipped + max(0.0, -low)) >= CONFIG.min_effective_sample_size

        k = int(RATIO * n) // BATCH * BATCH
        alone = ExampleSharding(n)
        lowest = lowest_log_probability(
            lambda block: clipped[block].double(),
            ends=(low, high),
            num_infinite=(0, 0),
            k=k,
            minimum=CONFIG.min_inclusion_probability,
            sharding=alone,
            device=scores.device,
        )
        phi, ids = clipped[own].double().clamp_(min=lowest), sharding.local_ids(scores.device)
        clipped = scores = scores[:0]  # frees both
        noisy = torch.empty_like(local)
        for block in blocks(
            len(ids), device=ids.device
        ):  # in blocks, as in ours, so that caches do not make the difference
            noisy[block] = phi[block] + gumbel(ids[block], derive_key(stream("noise"), *seed))
        everywhere = sharding.gather(noisy)[0].view(-1)[:n]
        values, indices = torch.topk(everywhere, k + 1, sorted=False)
        kappa = float(values.min())
        self.chosen = torch.zeros(n, dtype=torch.bool, device=noisy.device)
        self.chosen[indices] = True
        self.chosen[indices[values == kappa]] = False
        del values, indices, everywhere
        inverse = (1.0 / inclusion_probabilities(phi, kappa=kappa)).clamp(max=CONFIG.max_weight) * self.chosen[own]
        self.weights = (inverse / (float(sharding.sum(inverse.sum())) / k)).float()
        return numbers | self._audit()

    def _count(self, local: Tensor, watched: float) -> None:
        """Update the streaks of the quarantine by its rule."""
        taken, high, before = self.last_draw == self.num_draws - 1, local >= watched, self.streak >= 8
        taken &= self.last_draw != -1
        continues = (self.streak > 0) & (self.buffer.loss > 0.95 * self.start)
        counted = torch.where(high, torch.where(continues, self.streak + 1, 1), 0)
        self.start = torch.where(taken & high & ~continues & ~before, self.buffer.loss, self.start)
        self.streak = torch.where(taken & ~before, counted, self.streak).int()

    def _audit(self) -> Numbers:
        chosen = self.weights > 0
        age = (STEP - self.buffer.step).sum()
        again = (chosen & (self.last_draw == self.num_draws - 1) & (self.last_draw != -1)).sum()
        num_new = (chosen & (self.last_draw == -1)).sum()
        totals = self.sharding.sum(torch.stack((age, chosen.sum(), again, num_new))).tolist()
        self.last_draw[chosen] = self.num_draws
        self.num_draws += 1
        return {
            "loss_age": totals[0] / self.sharding.num_examples,
            "overlap": totals[2] / totals[1],
            "max_weight": float(self.sharding.max(self.weights.max())),
        }

    def selected(self) -> SelectedSlots:
        mask = np.packbits(self.chosen.cpu().numpy(), bitorder="little")
        return SelectedSlots(self.sharding.num_examples, bitmask=mask)


def share(scores: Tensor) -> float:
    """The effective sample size as a share, by plain sums."""
    positive = scores.double().clamp_(min=0.0)
    return float(positive.sum() ** 2 / (len(positive) * positive.square().sum()))


def first_batch(variant: Any, draws: Draws, *, sharding: ExampleSharding, number: int) -> tuple[Pass, Tensor]:
    """The pass over the selection of ``variant``, and the weights of this rank's rows of its first batch."""
    selected = variant.selected()
    pool = Pool.whole(sharding.num_examples)
    order = (0, number, 0)
    one = Pass(pool, selected, order, batch_size=BATCH, num_batches=len(selected) // BATCH, weighted=True)
    rows = slice(sharding.rank * BATCH // sharding.size, (sharding.rank + 1) * BATCH // sharding.size)
    draws.weights = variant.weights
    return one, draws.weights_of(one.slots(0, 1, rows))


def check_equal(ours: Draws, theirs: Gathering, numbers: Numbers) -> None:
    """RuntimeError if the two variants differ by more than rounding of sums and ties at the threshold."""
    n = ours.size
    differ = torch.stack([((ours.weights > 0) != (theirs.weights > 0)).sum(), (ours.weights > 0).sum()])
    num_differ, _ = ours.sharding.sum(differ).tolist()
    both = (ours.weights > 0) & (theirs.weights > 0)
    names = {"mean": "importance_mean", "share": "effective_sample_size", "p99": "importance_p99"}
    audit = {name: ours.audit[f"teacher/{names.get(name, name)}"] for name in numbers}
    worst = max(abs(audit[name] - numbers[name]) / max(1e-9, abs(numbers[name])) for name in numbers)
    weights = float((ours.weights - theirs.weights)[both].abs().max())
    if num_differ > 2 + n * 1e-6 or worst > 1e-3 or weights > 1e-4:
        raise RuntimeError(
            f"N = {n}: {num_differ} selections differ, weights differ by {weights}, statistics: {audit} and {numbers}"
        )


def work(mesh: DeviceMesh, device: str, num_examples: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """One rank: both variants in turns; returns this rank's numbers."""
    buffer = filled_buffer(mesh, device, num_examples)
    draws, rival = Draws(buffer, CONFIG, batch_size=BATCH), Gathering(buffer)
    stages, pool = Stages(device, Traffic()), Pool.whole(num_examples)
    for i in range(-1, rounds):
        seed = (0, i + 2, 0)
        numbers: Numbers = {}

        def ours(seed: tuple[int, ...] = seed, i: int = i) -> None:
            stages("ours: draw", lambda: draws.draw(pool, step=STEP, seed=seed, ratio=RATIO))
            stages("ours: turn-over", lambda: first_batch(draws, draws, sharding=buffer.sharding, number=i + 2))

        def gather(seed: tuple[int, ...] = seed, i: int = i, numbers: Numbers = numbers) -> None:
            kept = draws.weights
            numbers |= stages("gather: draw", lambda: rival.draw(seed=seed))
            stages("gather: turn-over", lambda: first_batch(rival, draws, sharding=buffer.sharding, number=i + 2))
            draws.weights = kept

        for way in (ours, gather) if i % 2 else (gather, ours):
            way()
        check_equal(draws, rival, numbers)
        if i < 0:
            stages.rows.clear()  # warm-up
    return stages.rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole sharded draws against all-gather and torch.topk.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[10**6, 10**7, 10**8],
        help="numbers of examples, multiples of --processes",
    )
    parser.add_argument("--processes", type=int, help="default: all GPUs, or 2 on CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.processes = args.processes or (torch.cuda.device_count() if args.device == "cuda" else 2)
    if any(size % args.processes for size in args.sizes) or BATCH % args.processes:
        parser.error(
            f"--sizes {args.sizes}: give multiples of --processes {args.processes}, which must be a power of two"
        )

    header, rows = measure.header(), []
    for size in args.sizes:
        stages = measure.run_ranks(work, args.device, size, args.rounds, num_ranks=args.processes, device=args.device)
        for name, numbers in stages.items():
            counted = {"collectives": int(numbers["collectives"][-1]), "received_bytes": int(numbers["received"][-1])}
            peak = int(max(numbers["peak"]))
            rows.append(
                {"examples": size, "stage": name, **measure.summary(numbers["seconds"]), **counted, "peak_bytes": peak}
            )
        row_of = {row["stage"]: row for row in rows if row["examples"] == size}
        seconds = {
            way: row_of[f"{way}: draw"]["seconds"] + row_of[f"{way}: turn-over"]["seconds"]
            for way in ("ours", "gather")
        }
        print(
            f"N = {size:,}: {row_of['gather: draw']['seconds'] / row_of['ours: draw']['seconds']:.1f} times faster, "
            f"{seconds['gather'] / seconds['ours']:.1f} with the turn-over; "
            f"{row_of['ours: draw']['peak_bytes'] / (size / args.processes):.0f} bytes per local example "
            f"against {row_of['gather: draw']['peak_bytes'] / (size / args.processes):.0f}",
            flush=True,
        )
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    shown = [
        {
            "N": row["examples"],
            "stage": row["stage"],
            "seconds": row["seconds"],
            "spread": f"{row['spread']:.0%}",
            "collectives": row["collectives"],
            "received bytes": row["received_bytes"],
            "MiB": row["peak_bytes"] // 2**20,
        }
        for row in rows
    ]
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
