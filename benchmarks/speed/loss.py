"""The loss: torchtitan's cross-entropy against ours, in time and peak memory.

    python -m benchmarks.speed.loss [--device cuda] [--tokens 8192] [--output loss.json]

Part "logits": bf16 logits -> loss -> gradient of the logits: the cost of a separate loss per example.
Part "head":   bf16 hidden states -> output layer -> loss -> gradients of hidden states and weight.

Each variant runs forward and backward; the logits are refilled, untimed, before each call. "MiB" is the peak of the
bytes that the call allocates; for the part "logits" it includes the logits, which are live at that point in a step. A
tenth of the labels is ignored. Weights are not all 1, except in "packed", which has four examples per row. Ratios are
to torchtitan's compiled loss or head.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
from torch import Tensor
from torch.nn import functional as F
from torchtitan.components.loss import cross_entropy_loss

from benchmarks.common import measure
from titan_attent.losses.chunked import build_chunked_loss
from titan_attent.losses.cross_entropy import IGNORE_INDEX, build_weighted_loss

BATCH = 4
VARIANTS = {  # name -> (with_gradient, chunks or None, compiled)
    "ours, compiled": (False, None, True),
    "ours + functional gradient, compiled": (True, None, True),
    "ours chunked, compiled": (False, True, True),
    "ours chunked + functional gradient, compiled": (True, True, True),
    "ours chunked, eager": (False, True, False),
}


def part_logits(args: argparse.Namespace, labels: Tensor, weights: Tensor) -> list[dict[str, Any]]:
    generator = torch.Generator(args.device).manual_seed(0)
    shape = (BATCH, args.tokens // BATCH, args.vocab)
    source = torch.randn(shape, generator=generator, device=args.device, dtype=torch.bfloat16)
    leaf = torch.empty_like(source).requires_grad_()

    def refresh() -> None:
        # The backward pass may have overwritten the logits, and the peak must not include the previous gradient.
        leaf.grad = None
        leaf.detach().copy_(source)

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            logits = leaf.view_as(leaf)  # not a leaf, like a model's logits; the same memory
            value = loss(logits)
            del logits
            (gradient,) = torch.autograd.grad(value, leaf)
            del gradient

        return call

    compiled = torch.compile(cross_entropy_loss)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "torchtitan, compiled": lambda z: compiled(z, labels),
        "torchtitan, eager": lambda z: cross_entropy_loss(z, labels),
    }
    for name, (with_gradient, chunked, compile_loss) in VARIANTS.items():
        options: dict[str, Any] = {"compile_loss": compile_loss, "with_gradient": with_gradient}
        ours = build_chunked_loss(num_chunks=args.chunks, **options) if chunked else build_weighted_loss(**options)
        losses[name] = lambda z, ours=ours: ours(z, labels, weights).weighted_sum  # type: ignore[misc]
    index = torch.arange(labels.numel(), device=args.device).view_as(labels) // (labels.shape[1] // 4)
    packed, ones = build_weighted_loss(compile_loss=True), torch.ones(int(index.max()) + 1, device=args.device)
    losses["ours packed, compiled"] = lambda z: packed(z, labels, ones, example_index=index).weighted_sum
    variants = {name: step(loss) for name, loss in losses.items()}
    return compare(args, variants, before=refresh, base=source.nbytes, part="logits")


def part_head(args: argparse.Namespace, labels: Tensor, weights: Tensor) -> list[dict[str, Any]]:
    generator = torch.Generator(args.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": args.device, "dtype": torch.bfloat16}
    hidden = torch.randn((BATCH, args.tokens // BATCH, args.dim), **options).requires_grad_()
    weight = (torch.randn((args.vocab, args.dim), **options) * args.dim**-0.5).requires_grad_()
    compiled = torch.compile(cross_entropy_loss)
    chunked = build_chunked_loss(num_chunks=args.chunks, compile_loss=True)

    def whole(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            logits = F.linear(hidden, weight)
            value = loss(logits)
            del logits
            torch.autograd.grad(value, (hidden, weight))

        return call

    variants = {
        "torchtitan, compiled": whole(lambda z: compiled(z, labels)),
        "ours chunked, compiled": whole(lambda z: chunked(z, labels, weights).weighted_sum),
    }
    return compare(args, variants, before=lambda: None, base=0, part="head")


def compare(
    args: argparse.Namespace,
    variants: dict[str, Callable[[], None]],
    *,
    before: Callable[[], None],
    base: int,
    part: str,
) -> list[dict[str, Any]]:
    times = measure.interleave(variants, rounds=args.rounds, device=args.device, before=before)
    rows = []
    for name, call in variants.items():
        before()
        peak = base + measure.peak_bytes(call, device=args.device)
        rows.append({"part": part, "variant": name, **measure.summary(times[name]), "peak_bytes": peak})
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="torchtitan's cross-entropy against ours.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument(
        "--tokens", type=int, help=f"tokens per batch of {BATCH} rows (default: 8192 on a GPU, 512 on CPU)"
    )
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--dim", type=int, help="width of the hidden states (default: 2048 on a GPU, 64 on CPU)")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of the chunked loss")
    parser.add_argument("--rounds", type=int, default=15, help="calls per variant")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.tokens = args.tokens or (8192 if args.device == "cuda" else 512)
    args.dim = args.dim or (2048 if args.device == "cuda" else 64)

    header = measure.header()
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, args.vocab, (BATCH, args.tokens // BATCH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE_INDEX
    labels, weights = labels.to(args.device), torch.tensor([0.5, 1.0, 1.5, 2.0], device=args.device)
    rows = part_logits(args, labels, weights) + part_head(args, labels, weights)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    shown = [measure.time_and_memory(row, "part", "variant") for row in rows]
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
