"""The losses of distillation: KL with a source's logits, and cross-entropy with ids, in time and peak memory.

    python -m benchmarks.speed.distillation [--device cuda] [--tokens 8192] [--output distillation.json]

bf16 logits of student and source -> loss -> gradient of the student's logits, forward and backward. Both logits are
refilled, untimed, before each call. "MiB" is the peak of the bytes that the call allocates, with the logits that are
live at that point in a step: two models', and for cross-entropy with ids one model's.

"two cross-entropies" is torchtitan's compiled loss on either logits. "plain, compiled" and "plain, eager" are KL from
two log-softmaxes. Ratios of time are to the two cross-entropies, ratios of memory to the eager plain form.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
from torch import Tensor
from torchtitan.components.loss import cross_entropy_loss

from benchmarks.common import measure
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.divergence import build_kernels, kl_divergence, target_cross_entropy

BATCH = 4


def plain_kl(student: Tensor, source: Tensor, valid: Tensor) -> Tensor:
    log_q, log_p = student.float().log_softmax(-1), source.float().log_softmax(-1)
    return torch.where(valid, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description="The losses of distillation against two cross-entropies.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument(
        "--tokens", type=int, help=f"tokens per batch of {BATCH} rows (default: 8192 on a GPU, 512 on CPU)"
    )
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--ids", type=int, default=32, help="target ids per token")
    parser.add_argument("--rounds", type=int, default=15, help="calls per variant")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.tokens = args.tokens or (8192 if args.device == "cuda" else 512)

    header = measure.header()
    generator = torch.Generator(args.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": args.device}
    shape = (BATCH, args.tokens // BATCH, args.vocab)
    first, second = (torch.randn(shape, dtype=torch.bfloat16, **options) for _ in range(2))
    leaf, source = torch.empty_like(first).requires_grad_(), torch.empty_like(second)
    labels = torch.randint(args.vocab, shape[:2], **options)
    labels[torch.rand(shape[:2], **options) < 0.1] = IGNORE_INDEX
    valid, ids = labels != IGNORE_INDEX, torch.randint(args.vocab, (*shape[:2], args.ids), **options)

    def refresh() -> None:
        leaf.grad = None
        leaf.detach().copy_(first)
        source.copy_(second)

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            (gradient,) = torch.autograd.grad(loss(leaf.view_as(leaf)), leaf)
            del gradient

        return call

    cross_entropy, compiled_kl = torch.compile(cross_entropy_loss), torch.compile(plain_kl)
    kernels, eager = build_kernels(compiled=True), build_kernels(compiled=False)
    of_source = torch.empty_like(second).requires_grad_()
    once = step(lambda z: cross_entropy(z, labels))

    def twice() -> None:
        once()
        (gradient,) = torch.autograd.grad(cross_entropy(of_source.view_as(of_source), labels), of_source)
        del gradient

    of_source.detach().copy_(second)
    both = 2 * first.nbytes
    variants: dict[str, tuple[Callable[[], None], int]] = {
        "two cross-entropies, compiled": (twice, both),
        "plain KL, eager": (step(lambda z: plain_kl(z, source, valid)), both),
        "plain KL, compiled": (step(lambda z: compiled_kl(z, source, valid)), both),
        "KL, compiled": (
            step(lambda z: kl_divergence(z, source, valid, overwrite=True, kernels=kernels).sum()),
            both,
        ),
        "KL, eager": (step(lambda z: kl_divergence(z, source, valid, overwrite=True, kernels=eager).sum()), both),
        f"{args.ids} ids, compiled": (
            step(lambda z: target_cross_entropy(z, ids, None, valid, kernels=kernels).sum()),
            first.nbytes,
        ),
        "one cross-entropy, compiled": (once, first.nbytes),
        "cross-entropy and ids, compiled": (
            step(
                lambda z: (
                    0.5 * cross_entropy(z, labels)
                    + 0.5 * target_cross_entropy(z, ids, None, valid, kernels=kernels).sum()
                )
            ),
            first.nbytes,
        ),
    }
    times = measure.interleave(
        {name: call for name, (call, _) in variants.items()}, rounds=args.rounds, device=args.device, before=refresh
    )
    rows = []
    for name, (call, base) in variants.items():
        refresh()
        peak = base + measure.peak_bytes(call, device=args.device)
        rows.append({"variant": name, **measure.summary(times[name]), "peak_bytes": peak})
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["memory_ratio"] = row["peak_bytes"] / rows[1]["peak_bytes"]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    shown = [measure.time_and_memory(row, "variant") for row in rows]
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
