"""The tiled attention of hyla_attent against its plain form and torch's softmax attention; and how its output grows.

    python -m benchmarks.speed.hyla [--length 2048] [--output hyla.json]

Causal, forward and backward, one row, one thread. "MiB" is the peak of the bytes that a call allocates, gradients
included. Ratios of time are to torch's scaled_dot_product_attention, ratios of memory to the plain form. Seconds are
CPU seconds of the process, so that other work on the machine counts little.

The second table is the memory of the tiled form by length. The third is the root mean square of the outputs of the last
eighth of the queries, at random weights: q, k and v are linear functions of random tokens that share a mean, as the
tokens of a model do: with and without the norm of the output. The fourth is a training step of a model: its parameters,
and the peak of what a step allocates.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import measure
from titan_attent.models.hyla.attention import HYLA, Form, allowed, plain_attention
from titan_attent.models.hyla.layer import HyperAttention
from titan_attent.models.hyla.tiled import tiled_attention
from titan_attent.titan.train_spec import attent_spec

MiB = 2**20


def qkv(length: int, *, heads: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, heads, width, generator=generator).requires_grad_() for _ in range(3)]


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain_attention(q, k, v, mask=allowed(q.shape[1], k.shape[1], start=0, causal=True))


def step(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    def call() -> None:
        output = attention(*inputs)
        torch.autograd.grad(output, inputs, output.detach())

    return call


def cpu_seconds(calls: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every call, in turns, after one call of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-1, rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if i >= 0:
                times[name].append(time.process_time() - start)
    return times


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    inputs = qkv(args.length, heads=args.heads, width=args.width)
    calls = {
        "torch's softmax attention": step(torchs, inputs),
        "plain": step(plain, inputs),
        "tiled": step(tiled_attention, inputs),
    }
    if args.backend:
        calls["tiled, compiled"] = step(lambda *x: tiled_attention(*x, backend=args.backend), inputs)
    few = {name: call for name, call in calls.items() if name != "plain"}
    times = cpu_seconds(few, rounds=args.rounds) | cpu_seconds({"plain": calls["plain"]}, rounds=2)
    rows = [
        {"variant": name, **measure.summary(times[name]), "peak_bytes": measure.peak_bytes(call, device="cpu")}
        for name, call in calls.items()
    ]
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["ratio_of_fastest"] = row["min_seconds"] / rows[0]["min_seconds"]
        row["memory_ratio"] = row["peak_bytes"] / rows[1]["peak_bytes"]
    return rows


def by_length(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for length in (args.length // 4, args.length // 2, args.length, 2 * args.length):
        inputs = qkv(length, heads=args.heads, width=args.width)
        peak = measure.peak_bytes(step(tiled_attention, inputs), device="cpu")
        rows.append({"length": length, "MiB": round(peak / MiB, 1), "KiB per position": round(peak / 1024 / length, 1)})
    return rows


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The output's size by the number of keys, of HYLA with and without the norm, and of softmax attention."""
    generator = torch.Generator().manual_seed(0)
    dim = args.heads * args.width
    weights = [torch.randn(dim, dim, generator=generator) * dim**-0.5 for _ in range(3)]
    rows = []
    for length in (64, 256, 1024, args.length):
        noise = torch.randn(1, length, dim, generator=generator)
        tokens = F.rms_norm(noise + 0.5 * torch.ones(dim), (dim,))
        q, k, v = ((tokens @ weight).unflatten(2, (args.heads, -1)) for weight in weights)
        last = slice(length - length // 8, length)
        attentions = {
            "hyla": HyperAttention(HYLA),
            "hyla, linear values": HyperAttention(Form(value_network="linear")),
            "hyla with output_norm": HyperAttention(HYLA, output_norm=True),
            "softmax": torchs,
        }
        sizes = {name: one(q, k, v)[:, last].square().mean().sqrt().item() for name, one in attentions.items()}
        rows.append({"keys": length} | {name: f"{size:.3g}" for name, size in sizes.items()})
    return rows


def models(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A step of the flavor 125M, whose vocabulary makes it 100 M to 130 M parameters, of each family."""
    rows: list[dict[str, Any]] = []
    for family in ("llama3", "hyla"):
        spec = attent_spec(f"{family}_attent")
        sizes: Any = replace(spec.model_args["125M"], vocab_size=2048, max_seq_len=args.model_length)  # type: ignore[type-var]
        model: Any = spec.model_cls(sizes)
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device("cpu"))
        tokens = torch.arange(args.model_length)[None] % 2048

        def train(model: Any = model, tokens: Tensor = tokens) -> None:
            model(tokens).float().logsumexp(dim=2).mean().backward()

        peak = measure.peak_bytes(train, device="cpu")
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        rows.append({"model": f"{family}_attent 125M", "parameters, MiB": parameters // MiB, "step, MiB": peak // MiB})
        rows[-1]["with AdamW, MiB"] = (3 * parameters + peak) // MiB
        del model
    for row in rows:
        row["ratio"] = round(row["with AdamW, MiB"] / rows[0]["with AdamW, MiB"], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="HYLA's tiled attention in time and memory.")
    parser.add_argument("--length", type=int, default=2048, help="positions")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="width of a head")
    parser.add_argument("--rounds", type=int, default=7, help="calls per variant")
    parser.add_argument("--backend", default="", help='of torch.compile, such as "inductor": one more variant')
    parser.add_argument("--model-length", type=int, default=512, help="positions of a row of the models")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header = measure.header()
    rows = compare(args)
    shown = [measure.time_and_memory(row, "variant") for row in rows]
    lengths, sizes, steps = by_length(args), growth(args), models(args)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    result = header | {"settings": settings, "rows": rows, "lengths": lengths, "growth": sizes, "models": steps}
    measure.publish(args.output, result, shown, lengths, sizes, steps)


if __name__ == "__main__":
    main()
