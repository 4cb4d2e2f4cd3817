"""A whole training step: torchtitan's own trainer against the teaching one.

    python -m benchmarks.speed.step_time [--processes 2] [--output step_time.json]

Both trainers are the real classes with the same model, optimizer, data and parallelism (FSDP2 over the processes), in
one process group. They alternate in blocks of steps; a block's time ends when its device work is done. A variant is
compared with the stock blocks between its own, in wall time and in CPU time of rank 0. Stock reads batches from the
same token shards, in order.

    uniform              the control: torchtitan's loss, with teacher and ledger
    soft                 ratio 1: per-example weighted loss, buffer, weights of a draw; everything is trained
    soft, gradient       the same, with the functional gradient measured
    reweighting          everything is trained, with weights by the loss within the step (Sow et al.)
    threshold            InfoBatch's weights

Only steps inside a pass are timed; selection.py measures the cost of a new pass. CPU: torchtitan's "debugmodel", fp32,
not compiled. GPU: "1B" (below), bf16, compiled.
"""

import argparse
import copy
import dataclasses
import gc
import json
import logging
import os
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from torchtitan.train import Trainer

from benchmarks.common import measure
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.titan.train_spec import attent_spec
from titan_attent.titan.trainer import TeachingTrainer

FLAVORS = {
    "debugmodel": llama3_args["debugmodel"],
    # 1.01 billion parameters: half of them in the vocabulary of Llama 3, where the loss works.
    "1B": TransformerModelArgs(
        dim=2048, n_layers=8, n_heads=32, n_kv_heads=8, ffn_dim_multiplier=1.5, multiple_of=256, rope_theta=500000
    ),
}

TEACHING = ["--teacher.warmup_passes", "0", "--teacher.full_data_tail", "0", "--teacher.max_repeats", "1000000000"]
"""A teacher that selects from the first step on, as it would in a run of no more steps than are timed."""
RATIO_1 = ["--teacher.ratio_schedule", "constant", "--teacher.initial_ratio", "1"]
VARIANTS = {
    "uniform": ["--teacher.strategy", "uniform"],
    "soft": ["--teacher.strategy", "soft", *RATIO_1, *TEACHING],
    "soft, gradient": [
        *("--teacher.strategy", "soft", *RATIO_1, *TEACHING),
        *("--teacher.importance", "functional_gradient"),
    ],
    "reweighting": ["--teacher.strategy", "random", "--teacher.weighting", "loss", *RATIO_1, *TEACHING],
    "threshold": ["--teacher.strategy", "threshold", *TEACHING],
}


class PlainLoader(BaseDataLoader):
    """Batches of the token shards in order, read in the training thread; no teacher, no extra tensors."""

    def __init__(self, *, dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any):
        self.dataset = TokenDataset(job_config.data.path, seq_len=job_config.training.seq_len)
        self.rank, self.size, self.batch = dp_rank, dp_world_size, job_config.training.local_batch_size

    def __iter__(self) -> Iterator[Any]:
        first = self.rank * self.batch
        while True:
            ids = (torch.arange(self.batch) + first) % len(self.dataset)
            inputs, labels = self.dataset.batch(ids)
            yield {"input": inputs}, labels
            first += self.size * self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the benchmark never resumes."""


def write_data(folder: Path, *, num_tokens: int) -> Path:
    """A token data set of at least ``num_tokens`` tokens: sources of the standard library, repeated."""
    sources = sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py"))
    text = [source.read_text(encoding="utf-8") for source in sources]
    repeats = -(-num_tokens * 4 // sum(map(len, text)))  # fewer than 4 characters per token
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in text * repeats)
    write_dataset([folder / "text.jsonl"], output=folder / "tokens", tokenizer="train:512")
    return folder / "tokens"


class Runner:
    """A trainer and its batches; ``run`` trains the next steps as ``Trainer.train`` does."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        assert trainer.dataloader is not None
        self.batches = trainer.batch_generator(trainer.dataloader)
        self.cpu_seconds: list[float] = []
        """CPU seconds of each block, all threads: other processes on the machine affect them less than wall times."""

    def run(self, steps: int) -> None:
        start = time.process_time()
        for _ in range(steps):
            self.trainer.step += 1
            self.trainer.gc_handler.run(self.trainer.step)
            self.trainer.train_step(self.batches)
        self.cpu_seconds.append(time.process_time() - start)


def build(args: argparse.Namespace, data: str, dump: str, teaching: Sequence[str] | None) -> Runner:
    """A trainer with the settings ``teaching`` on top of the defaults, or stock torchtitan's."""
    precision = "bfloat16" if args.device == "cuda" else "float32"
    name = "llama3_stock" if teaching is None else "llama3_attent"
    command = [
        *("--job.custom_config_module", "titan_attent.job_config", "--job.dump_folder", dump),
        *("--model.name", name, "--model.flavor", args.flavor, "--data.path", data),
        *("--training.local_batch_size", str(args.batch), "--training.seq_len", str(args.seq_len)),
        *("--training.steps", "1000000", "--training.mixed_precision_param", precision),
        *("--metrics.log_freq", "1000000", "--activation_checkpoint.mode", "none", "--debug.seed", "0"),
        *(["--compile.enable"] if args.compile else []),
        *(teaching or []),
    ]
    config = ConfigManager().parse_args(command)
    return Runner((Trainer if teaching is None else TeachingTrainer)(config))


def prepare(mesh: DeviceMesh, flavor: str) -> None:
    """Make this rank a process as torchtitan expects it, with both trainers' models registered."""
    rank = str(mesh.get_local_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(mesh.size())}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # warnings of torchtitan and torch about random numbers on CPU meshes
    flavors = {flavor: FLAVORS[flavor]}
    stock, ours = get_train_spec("llama3"), attent_spec("llama3_attent")
    register_train_spec(
        "llama3_stock",
        dataclasses.replace(
            stock, model_args=copy.deepcopy(flavors), build_dataloader_fn=PlainLoader, build_tokenizer_fn=None
        ),
    )
    register_train_spec("llama3_attent", dataclasses.replace(ours, model_args=copy.deepcopy(flavors)))


def work(mesh: DeviceMesh, args: argparse.Namespace, data: str, dump: str) -> Any:
    """One rank: the stock trainer, then each variant in turns with it; returns the rows of the table."""
    prepare(mesh, args.flavor)
    control = build(args, data, dump, None)
    control.run(args.warmup)
    rows = []
    for variant in args.variants:
        teaching = build(args, data, dump, VARIANTS[variant])
        teaching.run(args.warmup)
        runners = {"stock": control, variant: teaching}
        steps: dict[str, Callable[[], None]] = {k: (lambda r=r: r.run(args.block)) for k, r in runners.items()}
        times = measure.interleave(steps, rounds=args.rounds, device=args.device, before=dist.barrier, warmup=1)
        for name, runner in runners.items():
            cpu_seconds = statistics.median(runner.cpu_seconds[-args.rounds :])
            row = {"compared": variant, "trainer": name, "steps": args.block, **measure.summary(times[name])}
            rows.append(row | {"cpu_seconds": cpu_seconds})
        stock, ours = rows[-2:]
        ours |= {"ratio": ours["seconds"] / stock["seconds"], "cpu_ratio": ours["cpu_seconds"] / stock["cpu_seconds"]}
        teaching.trainer.close()
        del teaching, runners, steps
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="torchtitan's training step against the teaching one.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, help="default: 1 on a GPU, 2 on CPU")
    parser.add_argument("--flavor", choices=FLAVORS, help="default: 1B on a GPU, debugmodel on CPU")
    parser.add_argument("--batch", type=int, default=4, help="sequences per process and step")
    parser.add_argument("--seq-len", type=int, help="default: 2048 on a GPU, 128 on CPU")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the model (default: only on a GPU)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["uniform", "soft", "soft, gradient", "reweighting"]
    )
    parser.add_argument("--block", type=int, default=4, help="steps per block")
    parser.add_argument("--rounds", type=int, default=25, help="blocks per trainer")
    parser.add_argument("--warmup", type=int, default=20, help="steps of each trainer before its first block")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.processes = args.processes or (1 if gpu else 2)
    args.flavor = args.flavor or ("1B" if gpu else "debugmodel")
    args.seq_len = args.seq_len or (2048 if gpu else 128)
    args.compile = gpu if args.compile is None else args.compile

    header = measure.header()
    steps = args.warmup + (args.rounds + 1) * args.block + 40
    with tempfile.TemporaryDirectory() as folder:
        num_tokens = (steps * args.batch * args.processes + 1) * args.seq_len
        data = str(write_data(Path(folder), num_tokens=num_tokens))
        rows = measure.run_ranks(work, args, data, folder, num_ranks=args.processes, device=args.device)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    shown = [
        {
            "compared": row["compared"],
            "trainer": row["trainer"],
            "ms/step": 1e3 * row["seconds"] / row["steps"],
            "spread": f"{row['spread']:.0%}",
            "ratio": f"{row['ratio']:.3f}" if "ratio" in row else "",
            "CPU ms/step": 1e3 * row["cpu_seconds"] / row["steps"],
            "CPU ratio": f"{row['cpu_ratio']:.3f}" if "ratio" in row else "",
        }
        for row in rows
    ]
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
