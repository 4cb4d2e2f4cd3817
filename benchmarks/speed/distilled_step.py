"""A whole training step with distillation from targets on disk, against the same step without it.

    python -m benchmarks.speed.distilled_step [--processes 2] [--output distilled_step.json]

All trainers are the teaching one with ``strategy = "uniform"``, with the same model, optimizer, data and parallelism,
in one process group. They take turns in blocks of steps, in changing order; a block's time ends when its device work is
done. The targets are N random ids per token of the data, read by the reader threads as in a run.

    none              [distillation] off
    targets           N ids per token, a = 0.5: the labels' loss and the targets'
    targets alone     a = 0: the labels' loss is measured without a graph

Goal: targets at most 1.05 of none. CPU: torchtitan's "debugmodel", fp32, not compiled. GPU: "1B", bf16, compiled.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.common import measure
from benchmarks.speed.step_time import FLAVORS, build, prepare, write_data
from titan_attent.data.text.shards import TokenDataset
from titan_attent.scores.targets import TargetFacts, TargetsWriter, facts_of_data, window_places

WRITTEN_AT_ONCE = 1024
UNIFORM = ["--teacher.strategy", "uniform"]
GOAL = 1.05


def variants(targets: str) -> dict[str, list[str]]:
    distilling = [*UNIFORM, "--distillation.schedule", "final", "--distillation.targets", targets]
    return {
        "none": UNIFORM,
        "targets": [*distilling, "--distillation.label_weight", "0.5"],
        "targets alone": [*distilling, "--distillation.label_weight", "0"],
    }


def write_targets(folder: Path, data: str, *, seq_len: int, num: int) -> str:
    """Random target ids of every token of ``data``; returns the folder for ``distillation.targets``."""
    dataset = TokenDataset(data, seq_len=seq_len)
    vocab_size = dataset.shards.tokenizer_info["vocab_size"]
    facts = TargetFacts(
        **facts_of_data(dataset),
        model="random",
        precision="float32",
        checkpoint="",
        checkpoint_sha256="",
        kind="draws",
        num=num,
        temperature=1.0,
        seed=0,
        num_ids=vocab_size,
    )
    writer, generator = TargetsWriter(folder / "step-1", facts=facts), torch.Generator().manual_seed(0)
    with writer.prepared():
        for first in range(0, len(dataset), WRITTEN_AT_ONCE):
            rows = min(WRITTEN_AT_ONCE, len(dataset) - first)
            shape = (rows, seq_len, num)
            ids = torch.randint(vocab_size, shape, generator=generator, dtype=torch.int32)
            places = window_places(torch.arange(first, first + rows), seq_len=seq_len)
            writer.write(places, ids, None)
        writer.durable(len(dataset), num_records=facts.num_records)
    return str(folder)


def work(mesh: DeviceMesh, args: argparse.Namespace, data: str, targets: str, dump: str) -> Any:
    """One rank: all trainers in turns; returns the rows of the table."""
    prepare(mesh, args.flavor)
    runners = {}
    for name, settings in variants(targets).items():
        runners[name] = build(args, data, f"{dump}/{name}", settings)
        runners[name].run(args.warmup)
    steps: dict[str, Callable[[], None]] = {k: (lambda r=r: r.run(args.block)) for k, r in runners.items()}
    times = measure.interleave(steps, rounds=args.rounds, device=args.device, before=dist.barrier, warmup=1)
    rows: list[dict[str, Any]] = []
    for name, runner in runners.items():
        cpu_seconds = statistics.median(runner.cpu_seconds[-args.rounds :])
        rows.append({"variant": name, "steps": args.block, **measure.summary(times[name]), "cpu_seconds": cpu_seconds})
        for key, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
            rows[-1][ratio] = rows[-1][key] / rows[0][key]
        # Of the rounds: a machine that slows down slows a round's variants alike.
        rows[-1]["ratio_of_rounds"] = statistics.median(
            own / control for own, control in zip(times[name], times["none"], strict=True)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step with targets on disk against one without.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--flavor", choices=FLAVORS, help="default: 1B on a GPU, debugmodel on CPU")
    parser.add_argument("--batch", type=int, default=4, help="sequences per process and step")
    parser.add_argument("--seq-len", type=int, help="default: 2048 on a GPU, 128 on CPU")
    parser.add_argument("--ids", type=int, default=32, help="target ids per token")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile model and loss (default: only on a GPU)"
    )
    parser.add_argument("--block", type=int, default=2, help="steps per block")
    parser.add_argument("--rounds", type=int, default=25, help="blocks per trainer")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each trainer before its first block")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.flavor = args.flavor or ("1B" if gpu else "debugmodel")
    args.seq_len = args.seq_len or (2048 if gpu else 128)
    args.compile = gpu if args.compile is None else args.compile

    header = measure.header()
    steps = args.warmup + (args.rounds + 1) * args.block + 40
    with tempfile.TemporaryDirectory() as folder:
        num_tokens = (steps * args.batch * args.processes + 1) * args.seq_len
        data = str(write_data(Path(folder), num_tokens=num_tokens))
        targets = write_targets(Path(folder) / "targets", data, seq_len=args.seq_len, num=args.ids)
        rows = measure.run_ranks(work, args, data, targets, folder, num_ranks=args.processes, device=args.device)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    shown = [
        {
            "variant": row["variant"],
            "ms/step": 1e3 * row["seconds"] / row["steps"],
            "spread": f"{row['spread']:.0%}",
            "ratio": f"{row['ratio']:.3f}",
            "of rounds": f"{row['ratio_of_rounds']:.3f}",
            "CPU ms/step": 1e3 * row["cpu_seconds"] / row["steps"],
            "CPU ratio": f"{row['cpu_ratio']:.3f}",
        }
        for row in rows
    ]
    measure.publish(args.output, header | {"settings": settings, "goal": GOAL, "rows": rows}, shown)


if __name__ == "__main__":
    main()
