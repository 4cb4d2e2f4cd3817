"""Training speed on images: the product's steps, uniform and taught, against a plain PyTorch loop of the same model.

    python -m benchmarks.speed.vision_step [--flavor b16] [--side 224] [--batch 128] [--steps 20] [--compile]
                                           [--output FILE]

All three train the same ``vit_attent`` with AdamW on the same shards of random pixels, bf16 on a GPU, fp32 on a CPU, in
this one process. The plain loop reads each batch with one call between its steps, the product with its reader threads.
The taught run records losses and functional gradients of every image and draws each pass by them (``soft``). The
variants take turns; a time is that of ``--steps`` steps, up to the end of their device work.

After the timed steps, the taught run's steps must not wait for the device: ``host syncs`` counts the warnings of
torch's sync debug mode in them (GPU only).

Cost: 256 images of 150 kB on disk, and about a minute on an H200, half of it compilation.
"""

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchtitan.config import ConfigManager
from torchtitan.protocols.train_spec import register_train_spec

from benchmarks.common import measure
from titan_attent.data.images import ImageDataset, write_images
from titan_attent.titan.models.vision import args_of
from titan_attent.titan.train_spec import attent_spec
from titan_attent.titan.trainer import TeachingTrainer

PLANNED_STEPS = 1_000_000
VARIANTS = {
    "uniform": ["--teacher.strategy", "uniform"],
    "soft, functional gradient": [
        *("--teacher.strategy", "soft", "--teacher.importance", "functional_gradient"),
        *("--teacher.max_repeats", str(PLANNED_STEPS)),  # with so many steps the default would leave out nothing
    ],
}


def command(args: argparse.Namespace, folder: str, more: Sequence[str]) -> list[str]:
    return [
        *("--job.custom_config_module", "titan_attent.job_config", "--job.dump_folder", f"{folder}/run"),
        *("--model.name", "vit_attent", "--model.flavor", args.flavor, "--data.path", f"{folder}/data"),
        *("--vision.image_size", str(args.side), "--training.local_batch_size", str(args.batch)),
        *("--training.steps", str(PLANNED_STEPS), "--metrics.log_freq", str(PLANNED_STEPS), "--debug.seed", "0"),
        *("--training.mixed_precision_param", "bfloat16" if args.device == "cuda" else "float32"),
        *("--activation_checkpoint.mode", "none", *(["--compile.enable"] if args.compile else []), *more),
    ]


def product(args: argparse.Namespace, folder: str, more: Sequence[str]) -> Callable[[], None]:
    """A function that does ``--steps`` steps of the product's trainer."""
    trainer = TeachingTrainer(ConfigManager().parse_args(command(args, folder, more)))
    batches: Any = trainer.batch_generator(trainer.dataloader)

    def steps() -> None:
        for _ in range(args.steps):
            trainer.step += 1
            trainer.gc_handler.run(trainer.step)
            trainer.train_step(batches)

    return steps


def plain(args: argparse.Namespace, folder: str) -> Callable[[], None]:
    """A function that does the same steps in a plain loop."""
    config = ConfigManager().parse_args(command(args, folder, []))
    spec = attent_spec("vit_attent")
    with torch.device(args.device):
        model: Any = spec.model_cls(args_of(config))
        model.init_weights()
    if args.compile:
        for block in model.layers.values():
            block.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)
    images, at = ImageDataset(f"{folder}/data", size=args.side), [0]

    def steps() -> None:
        for _ in range(args.steps):
            ids = (torch.arange(args.batch) + at[0]) % len(images)
            at[0] += args.batch
            pixels, labels = (tensor.to(args.device) for tensor in images.pixels(ids, None))
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                logits = model(pixels)[:, 0]
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()

    return steps


def host_syncs(steps: Callable[[], None]) -> int:
    """The number of waits for the device that torch reports in these steps."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def prepare(args: argparse.Namespace, folder: str) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    register_train_spec("vit_attent", attent_spec("vit_attent"))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (args.images, args.side, args.side, 3), dtype=np.uint8)
    np.savez(f"{folder}/images.npz", images=pixels, labels=np.arange(args.images) % 100)
    write_images([f"{folder}/images.npz"], output=f"{folder}/data")
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Training speed on images, against a plain PyTorch loop.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--flavor", default="b16", help="flavor of vit_attent")
    parser.add_argument("--side", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--images", type=int, default=256, help="images in the data set")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--steps", type=int, default=20, help="steps per time")
    parser.add_argument("--rounds", type=int, default=5, help="times per variant")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--output", type=Path, help="JSON file")
    args, header = parser.parse_args(argv), measure.header()
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, folder)
        ways = {"plain loop": plain(args, folder)}
        ways |= {name: product(args, folder, more) for name, more in VARIANTS.items()}
        times = measure.interleave(ways, rounds=args.rounds, device=args.device)
        syncs = {name: host_syncs(way) if args.device == "cuda" else None for name, way in ways.items()}
        dist.destroy_process_group()
    rows = []
    for name, seconds in times.items():
        summary = measure.summary(seconds)
        pace = args.steps * args.batch / summary["seconds"]
        rows.append({"loop": name, "images_per_second": pace, "spread": summary["spread"], "host_syncs": syncs[name]})
    shown = [
        {
            "loop": row["loop"],
            "images/s": f"{row['images_per_second']:,.0f}",
            "of the plain loop": f"{row['images_per_second'] / rows[0]['images_per_second']:.3f}",
            "spread": f"{row['spread']:.1%}",
            f"host syncs in {args.steps} steps": "" if row["host_syncs"] is None else str(row["host_syncs"]),
        }
        for row in rows
    ]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
