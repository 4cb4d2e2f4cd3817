"""The speed of cheaper steps: [freezing] and [highway] against backpropagation through everything, on one GPU.

    python -m benchmarks.speed.gpu_steps [--flavor bench_gpu] [--seq-len 1024] [--batch 16] [--steps 40] [--output FILE]
    python -m benchmarks.speed.gpu_steps --flavor bench --seq-len 96 --batch 8 --steps 15 --log-every 3 --rounds 1

The second command checks that it works without a GPU.

Every run is the product's own trainer, as ``torchrun --nproc_per_node=1 -m titan_attent.train`` makes it, in this one
process: bf16 on a GPU, fp32 on a CPU, no FSDP2. The text is that of the Python standard library
(corpora/stdlib_code.py), repeated as needed. The rules take turns, ``--rounds`` times. Then each rule of ``--compiled``
runs once with ``compile.enable``. In every run, all steps but the first follow the rule: none is exact, and the active
modules are chosen once, after the first step.

A time is that of ``--log-every`` steps, up to the end of their device work. The first two times of a run, with its
start, compilation and probe, do not count. "seconds per step" is the median of the others over all rounds, "spread"
their interquartile range as a share of it. FLOPs saved are those that the run counts for the same steps. "probe" is
the time of one decision with its probe. "start" is the time of the start, plus the additional time of the first steps,
compilation included.

Cost: about 20 s of compilation per rule of ``--compiled``, more for those of [freezing]; one minute for the others.
"""

import argparse
import gc
import logging
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
import torch.distributed as dist
from torchtitan.config import ConfigManager
from torchtitan.protocols.train_spec import register_train_spec

from benchmarks.common import measure
from benchmarks.corpora.stdlib_code import Sizes, build_corpora
from titan_attent.titan.train_spec import attent_spec
from titan_attent.titan.trainer import TeachingTrainer

PLANNED_STEPS = 1_000_000
"""Planned steps of a run; the measured steps are far from its end."""
SKIPPED = 2
"""Number of times at the start of a run that do not count."""


def modules(policy: str, backward_share: float) -> list[str]:
    keys = {"policy": policy, "backward_share": backward_share, "warmup_steps": 1, "interval": PLANNED_STEPS}
    return [part for key, value in keys.items() for part in (f"--freezing.{key}", str(value))]


def highway(iterations: int, cut: str) -> list[str]:
    keys = {"method": "highway", "iterations": iterations, "cut": cut, "exact_fraction": 0.0}
    return [part for key, value in keys.items() for part in (f"--highway.{key}", str(value))]


RULES = {
    "exact": [],
    "highway_0": highway(0, "branch"),
    "highway_1": highway(1, "block"),
    "prefix": modules("prefix", 0.54),
    "mat": modules("mat", 0.7),
    "truncated": modules("truncated", 0.54),
}


def build(args: argparse.Namespace, rule: str, folder: str, *, compiled: bool) -> TeachingTrainer:
    command = [
        *("--job.custom_config_module", "titan_attent.job_config", "--job.dump_folder", f"{folder}/run"),
        *("--model.name", "llama3_attent", "--model.flavor", args.flavor, "--data.path", f"{folder}/corpora/clean"),
        *("--training.local_batch_size", str(args.batch), "--training.seq_len", str(args.seq_len)),
        *("--training.steps", str(PLANNED_STEPS), "--metrics.log_freq", str(PLANNED_STEPS), "--debug.seed", "0"),
        *("--training.mixed_precision_param", "bfloat16" if args.device == "cuda" else "float32"),
        *("--teacher.strategy", "uniform", "--activation_checkpoint.mode", "none"),
        *(["--compile.enable"] if compiled else []),
        *RULES[rule],
    ]
    return TeachingTrainer(ConfigManager().parse_args(command))


def saved(trainer: TeachingTrainer) -> dict[str, float]:
    """FLOPs saved so far, in units of a full backward pass and of a full step."""
    metrics = trainer.systems.metrics()
    tags = {key: [f"{system}/saved_of_{key}" for system in ("freezing", "highway")] for key in ("backward", "step")}
    return {key: trainer.step * sum(metrics.get(tag, 0.0) for tag in names) for key, names in tags.items()}


def train(trainer: TeachingTrainer, batches: Any, steps: int) -> None:
    """The next steps, as ``Trainer.train`` makes them."""
    for _ in range(steps):
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)


def measured(args: argparse.Namespace, trainer: TeachingTrainer, *, start: float) -> dict[str, Any]:
    """Run the trainer, which was made at ``start``, and measure it.

    Returns:
        seconds: seconds per step, for every time that counts. peak: bytes allocated during these; 0 on a CPU.
        backward, step: the shares of FLOPs saved in them. probe, start: seconds.
    """
    is_gpu = args.device == "cuda"
    batches, times, counted_from = trainer.batch_generator(trainer.dataloader), [], SKIPPED * args.log_every
    started = time.perf_counter() - start
    before = {"backward": 0.0, "step": 0.0}
    for i in range(args.steps // args.log_every):
        if i == SKIPPED:
            before = saved(trainer)
            if is_gpu:
                torch.cuda.reset_peak_memory_stats()
        seconds = measure.seconds(lambda: train(trainer, batches, args.log_every), device=args.device)
        times.append(seconds / args.log_every)
    shares = {key: (value - before[key]) / (trainer.step - counted_from) for key, value in saved(trainer).items()}
    peak = torch.cuda.max_memory_allocated() if is_gpu else 0
    probe = trainer.ledger.seconds.get("probe", 0.0)
    started += (times[0] - statistics.median(times[SKIPPED:])) * args.log_every - probe
    return {"seconds": times[SKIPPED:], "peak": peak, "probe": probe, "start": started} | shares


def run(args: argparse.Namespace, rule: str, folder: str, *, compiled: bool) -> dict[str, Any]:
    """One run; returns the dictionary of :func:`measured`."""
    torch.compiler.reset()
    start = time.perf_counter()
    trainer = build(args, rule, folder, compiled=compiled)
    try:
        return measured(args, trainer, start=start)
    finally:
        trainer.close()
        del trainer
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def rows_of(runs: dict[tuple[str, bool], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row of numbers per rule, over its runs."""
    medians = {
        key: statistics.median(seconds for one in own for seconds in one["seconds"]) for key, own in runs.items() if own
    }
    rows = []
    for (rule, compiled), own in runs.items():
        if not own:
            continue
        seconds = [value for one in own for value in one["seconds"]]
        exact = medians.get(("exact", compiled))
        rows.append(
            {
                "rule": rule,
                "compiled": compiled,
                "seconds": medians[rule, compiled],
                "spread": measure.summary(seconds)["spread"] if len(seconds) > 1 else 0.0,
                "ratio": medians[rule, compiled] / exact if exact else None,
                "peak_bytes": max(one["peak"] for one in own),
                "saved_of_backward": own[0]["backward"],
                "saved_of_step": own[0]["step"],
                "probe_seconds": statistics.median(one["probe"] for one in own),
                "start_seconds": statistics.median(one["start"] for one in own),
            }
        )
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows as text, for Markdown."""
    return [
        {
            "rule": row["rule"],
            "compiled": "yes" if row["compiled"] else "",
            "seconds per step": f"{row['seconds']:.4f}",
            "spread": f"{row['spread']:.1%}",
            "of exact": f"{row['ratio']:.3f}" if row["ratio"] else "",
            "peak memory, GiB": f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else "",
            "backward FLOPs saved": f"{row['saved_of_backward']:.1%}",
            "step FLOPs saved": f"{row['saved_of_step']:.1%}",
            "probe, s": f"{row['probe_seconds']:.2f}" if row["probe_seconds"] >= 0.005 else "",
            "start, s": f"{row['start_seconds']:.1f}",
        }
        for row in rows
    ]


def prepare(args: argparse.Namespace, folder: str) -> None:
    """Write the data, and make this process the only one of a world, as torchtitan expects it."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # warnings of torchtitan and torch about random numbers on CPU meshes
    spec = attent_spec("llama3_attent")
    register_train_spec("llama3_attent", spec)
    build_corpora(Path(folder) / "corpora", sizes=Sizes(vocab_size=spec.model_args[args.flavor].vocab_size))  # type: ignore[attr-defined]
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The speed of cheaper steps on one GPU.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--flavor", default="bench_gpu", help="flavor of llama3_attent")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run")
    parser.add_argument("--log-every", type=int, default=5, help="steps per time")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each rule that is not compiled")
    parser.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--compiled", nargs="*", choices=RULES, default=["exact", "highway_0", "prefix"])
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if args.steps // args.log_every <= SKIPPED:
        parser.error(
            f"--steps {args.steps}: the first {SKIPPED} times of {args.log_every} steps do not count; give more"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args, header = parse_args(argv), measure.header()
    turns = [(rule, False) for _ in range(args.rounds) for rule in args.rules] + [
        (rule, True) for rule in args.compiled
    ]
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {turn: [] for turn in turns}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, folder)
        for number, turn in enumerate(turns, 1):
            name = f"{turn[0]}{', compiled' if turn[1] else ''}"
            began = time.perf_counter()
            try:
                runs[turn].append(run(args, turn[0], folder, compiled=turn[1]))
            except Exception:  # measure the others nevertheless
                traceback.print_exc()
                failed = True
            print(f"[{number}/{len(turns)}] {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            if args.rounds * len(args.rules) <= number < len(turns):
                print(measure.table(shown(rows_of(runs))), flush=True)  # in case compilation takes too long
        dist.destroy_process_group()
    rows = rows_of(runs)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
