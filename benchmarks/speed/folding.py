"""Folding token losses by example: the weighted loss of packed documents against torchtitan's compiled cross-entropy.

    python -m benchmarks.speed.folding [--device cuda] [--publish docs/results/folding]

bf16 logits -> loss -> gradient of the logits, forward and backward. A row holds documents of random lengths, with
weights that are not 1, and a tenth of the labels is ignored. The logits are refilled, untimed, before each call. "MiB"
is the peak of the bytes that a call allocates, the logits included.

    torchtitan    its own cross_entropy_loss, compiled: one sum over all tokens
    rows          ours where each row is one example, compiled
    folded        ours with ``example_index``, compiled: the loss that a run with ``data.unit = "document"`` computes
    in chunks     the same with ``teacher.loss_chunks``

The variants take turns. A ratio is the median over the rounds of the ratio to torchtitan's call in the same round.
"CPU" is the same ratio for the seconds of CPU, which on a shared machine depend less on other work.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
from torch import Tensor
from torchtitan.components.loss import cross_entropy_loss

from benchmarks.common import measure
from titan_attent.losses.chunked import build_chunked_loss
from titan_attent.losses.cross_entropy import IGNORE_INDEX, build_weighted_loss

GOAL = 1.02
BASE, OURS = "torchtitan", "folded"


def documents(rows: int, length: int, *, per_row: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """(example_index, int64 [rows, length], of ``per_row`` documents of random lengths in each row; number of them)."""
    borders = torch.rand(rows, per_row - 1, generator=generator).mul(length).long().sort(dim=1).values
    number = torch.searchsorted(borders.contiguous(), torch.arange(length).expand(rows, -1).contiguous(), right=True)
    return number + torch.arange(rows)[:, None] * per_row, rows * per_row


def losses_of(args: argparse.Namespace, vocab: int) -> tuple[Tensor, dict[str, Callable[[Tensor], Tensor]]]:
    """(logits, bf16 [rows, length, vocab]; variant -> its scalar loss)."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocab, (args.rows, args.length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE_INDEX
    index, num = documents(args.rows, args.length, per_row=args.documents, generator=generator)
    weights = (0.5 + torch.rand(num, generator=generator)).to(args.device)
    labels, index = labels.to(args.device), index.to(args.device)
    row_weights = weights[: args.rows]
    logits = torch.randn(
        (args.rows, args.length, vocab),
        generator=torch.Generator(args.device).manual_seed(0),
        device=args.device,
        dtype=torch.bfloat16,
    )
    stock, rows = torch.compile(cross_entropy_loss), build_weighted_loss(compile_loss=True)
    folded = build_weighted_loss(compile_loss=True)
    chunked = build_chunked_loss(num_chunks=args.chunks, compile_loss=True)
    return logits, {
        BASE: lambda z: stock(z, labels),
        "rows": lambda z: rows(z, labels, row_weights).weighted_sum,
        OURS: lambda z: folded(z, labels, weights, example_index=index).weighted_sum,
        "in chunks": lambda z: chunked(z, labels, weights, example_index=index).weighted_sum,
    }


def measured(args: argparse.Namespace, vocab: int) -> list[dict[str, Any]]:
    """One row of results for each variant."""
    torch._dynamo.reset()
    source, losses = losses_of(args, vocab)
    leaf = torch.empty_like(source).requires_grad_()
    cpu: dict[str, list[float]] = {name: [] for name in losses}

    def refresh() -> None:
        leaf.detach().copy_(source)

    def step(name: str, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            start = time.process_time()
            logits = leaf.view_as(leaf)  # not a leaf, like a model's logits; the same memory
            value = loss(logits)
            del logits
            torch.autograd.grad(value, leaf)
            cpu[name].append(time.process_time() - start)

        return call

    variants = {name: step(name, loss) for name, loss in losses.items()}
    times = measure.interleave(variants, rounds=args.rounds, device=args.device, before=refresh)
    rows = []
    for name, call in variants.items():
        refresh()
        peak = source.nbytes + measure.peak_bytes(call, device=args.device)
        cpu[name] = cpu[name][-args.rounds - 1 : -1]  # without the warm-up and the last call
        rows.append({"vocab": vocab, "variant": name, **measure.summary(times[name]), "peak_bytes": peak})
    for row in rows:
        row["time_ratio"] = paired(times[row["variant"]], times[BASE])
        row["cpu_ratio"] = None if args.device == "cuda" else paired(cpu[row["variant"]], cpu[BASE])
        row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return rows


def paired(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of the same rounds."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def page(result: dict[str, Any], shown: list[dict[str, Any]]) -> str:
    """The Markdown page of a result."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    device = machine["gpu"] if settings["device"] == "cuda" else f"{settings['threads']} thread of an {machine['cpu']}"
    kinds = (("time", "time_ratio"), ("CPU time", "cpu_ratio"), ("peak memory", "memory_ratio"))
    goals = [
        f"| {name} of the folded loss, vocabulary of {row['vocab']:,}: at most {GOAL} x torchtitan's | "
        f"{row[key]:.3f} | {'met' if row[key] <= GOAL else '**missed**'}"
        f"{', spread {:.0%}'.format(row['spread']) if key == 'time_ratio' else ''} |"
        for row in result["rows"]
        if row["variant"] == OURS
        for name, key in kinds
        if row[key] is not None
    ]
    return "\n".join(
        [
            "# Folding: the loss of packed documents against torchtitan's own",
            "",
            "What one loss per document costs beside one sum over all tokens, forward and backward. Printed by the",
            "following command, with all numbers in [folding.json](folding.json). How it is measured: the head of",
            "[`benchmarks/speed/folding.py`](../../benchmarks/speed/folding.py).",
            "",
            f"    {result['command']}",
            "",
            f"{device}, shared with other work (load {machine['load_at_start']:.1f} at the start), Python "
            f"{versions['python']}, torch {versions['torch']}, {result['date']}. {settings['rows']} rows of "
            f"{settings['length']:,} tokens in bf16, {settings['documents']} documents per row, "
            f"{settings['rounds']} rounds.",
            "",
            "| goal | measured | |",
            "|---|---|---|",
            *goals,
            "",
            measure.table(shown).rstrip(),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The folded loss of packed documents against torchtitan's.")
    device = os.environ.get("DEVICE") or measure.default_device()
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="also by the variable DEVICE")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--documents", type=int, default=16, help="documents per row")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of the chunked loss")
    parser.add_argument("--rounds", type=int, default=15, help="calls per variant")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on CPU")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--publish", type=Path, help="write PATH.json and PATH.md")
    args = parser.parse_args()
    header = measure.header()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    rows = [row for vocab in args.vocab for row in measured(args, vocab)]
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "publish")}
    shown = [
        {
            "vocabulary": f"{row['vocab']:,}",
            "variant": row["variant"],
            "ms": 1e3 * row["seconds"],
            "spread": f"{row['spread']:.0%}",
            "time": f"{row['time_ratio']:.3f}",
            "CPU": "" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.3f}",
            "MiB": row["peak_bytes"] // 2**20,
            "memory": f"{row['memory_ratio']:.3f}",
        }
        for row in rows
    ]
    result = header | {"settings": settings, "rows": rows}
    measure.publish(args.output, result, shown)
    if args.publish is not None:
        args.publish.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.publish.with_suffix(".md").write_text(page(result, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
