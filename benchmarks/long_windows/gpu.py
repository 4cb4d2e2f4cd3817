"""Long windows on one GPU: windows or documents with 126 M parameters; the cost of document masks and folding.

    python -m benchmarks.long_windows.gpu --prepare data/long_windows        # with a network: data and scorers
    python -m benchmarks.long_windows.gpu --data data/long_windows --output outputs/long_windows_gpu   # on the GPU
    python -m benchmarks.long_windows.gpu --rehearse --output outputs/rehearsal        # both, on a CPU, tiny, minutes

The data are at most 20 M tokens in shards of two bytes per token, which travel to a machine without a network: code and
manual pages, cut into documents of 600 to 6,000 characters, and half of the documents made junk (corpora.py), so that
nearly every window of 2,048 tokens is mixed. The scorers are tables of bigrams, made where the data are made.

Part "steps": seconds per step in one process, compiled, the variants in turns. A step is of equal windows in all.

    windows           uniform, in windows: torchtitan's own step
    documents         uniform, packed: its loss has no fold
    documents, fold   the same windows with a teacher at ratio 1: the loss is folded by document
    documents, flex   uniform, packed, with flex attention that sees no documents
    documents, mask   the same with ``document_mask``

Part "train": uniform, difference on windows, difference on documents, with equal steps: as many as uniform makes in
``--seconds``, by the seconds of part "steps". Every run is the product's own command, decayed to zero, and is validated
on windows of the wanted text. With few tokens a run sees its data several times.

The same command resumes: what is in results.json is not run again. Cost on a GPU: ``--seconds`` for each of the three
runs, and about a minute each for the start and compilation of a run or a variant.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import measure
from benchmarks.corpora import texts
from benchmarks.long_windows.__main__ import CONFIG, LAUNCH, run
from benchmarks.long_windows.corpora import (
    Corpus,
    cut,
    divided,
    random_characters,
    shuffled,
    shuffled_words,
    standard_library,
)

MOST_TOKENS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Size:
    """What runs: on the GPU, or in a rehearsal."""

    flavor: str
    vocab_size: int
    characters: int
    """Of the training text."""
    trusted: int
    """Characters of the trusted text; a sixth of it is the validation text."""
    seq_len: int
    batch: int
    """Windows per step."""
    lr: float
    precision: str
    compiled: bool
    timed: tuple[int, int]
    """Steps per time of part "steps", and number of times."""


GPU = Size(
    flavor="bench_125m",
    vocab_size=8192,
    characters=48_000_000,
    trusted=6_000_000,
    seq_len=2048,
    batch=32,
    lr=1e-3,
    precision="bfloat16",
    compiled=True,
    timed=(10, 5),
)
REHEARSAL = Size(
    flavor="bench",
    vocab_size=1024,
    characters=300_000,
    trusted=400_000,
    seq_len=256,
    batch=2,
    lr=1e-2,
    precision="float32",
    compiled=False,
    timed=(1, 4),
)

UNIFORM = ("--teacher.strategy", "uniform")
RATIO_1 = (
    *("--teacher.strategy", "soft", "--teacher.ratio_schedule", "constant", "--teacher.initial_ratio", "1"),
    *("--teacher.warmup_passes", "0", "--teacher.full_data_tail", "0", "--teacher.max_repeats", "1000000000"),
    *("--teacher.scores", ""),
)
DOCUMENTS = ("--data.unit", "document", "--data.validation_unit", "window")
STEPS = {
    "windows": ("", "--data.unit", "window", *UNIFORM),
    "documents": ("", *DOCUMENTS, *UNIFORM),
    "documents, fold": ("", *DOCUMENTS, *RATIO_1),
    "documents, flex": ("_flex", *DOCUMENTS, *UNIFORM),
    "documents, mask": ("_flex", *DOCUMENTS, *UNIFORM, "--data.document_mask"),
}
"""Variant -> suffix of the flavor, options."""
RATIOS = {
    "packing": ("documents", "windows"),
    "fold": ("documents, fold", "documents"),
    "flex attention": ("documents, flex", "documents"),
    "document mask": ("documents, mask", "documents, flex"),
    "document mask, of sdpa": ("documents, mask", "documents"),
}
"""Name of a ratio -> the two variants."""
TRAINED = {"uniform": "", "windows": "windows", "documents": "documents"}
"""Rule -> the folder of the scores that it reads."""


# -- the data ---------------------------------------------------------------------------------------------------------


def corpus(size: Size, folder: Path) -> Corpus:
    """The documents; half of the training documents are junk."""
    rng = random.Random(0)
    if size is GPU:
        texts.fetch(folder)
        parts = divided(texts.read(folder, "code") + texts.read(folder, "manual"), rng)
    else:
        of = standard_library(folder)
        parts = {"train": of["code"], "trusted": of["trusted"], "validation": of["validation"]}
    pieces = {name: cut(parts[name], rng) for name in parts}
    rng.shuffle(pieces["train"])
    available = sum(map(len, pieces["train"]))
    documents = texts.at_most(pieces["train"], min(size.characters, available - 1))
    half = len(documents) // 2
    junk = [(shuffled_words if i % 2 else random_characters)(text, rng) for i, text in enumerate(documents[:half])]
    trusted, validation = (
        texts.at_most(pieces[name], min(characters, sum(map(len, pieces[name])) - 1))
        for name, characters in (("trusted", size.trusted), ("validation", size.trusted // 6))
    )
    return shuffled(documents[half:], junk, trusted, validation, rng)


def prepare(size: Size, folder: Path) -> None:
    """Write the data and both pairs of scorers; folders that exist stay. ValueError for more tokens than allowed."""
    data, written = folder / "tokens", ("train", "trusted", "validation")
    if not all((data / part / "index.json").is_file() for part in written):
        with tempfile.TemporaryDirectory() as temporary:
            documents = corpus(size, Path(temporary))
            for part in written:
                source = Path(temporary) / f"{part}.jsonl"
                lines = (json.dumps({"text": text}) + "\n" for text in documents[part])
                source.write_text("".join(lines), encoding="utf-8")
                made_before = part != "train"
                tokenizer = data / "train" / "tokenizer.tiktoken" if made_before else f"train:{size.vocab_size}"
                command = [sys.executable, "-m", "titan_attent.data.text", source, "--output", data / part]
                run([*command, "--tokenizer", tokenizer], folder / f"{part}.log")
    index = json.loads((data / "train" / "index.json").read_bytes())
    if (num_tokens := sum(shard["num_tokens"] for shard in index["shards"])) > MOST_TOKENS:
        raise ValueError(f"{data}: {num_tokens:,} tokens are more than {MOST_TOKENS:,}: give fewer characters")
    for unit in ("window", "document"):
        scorers = folder / "scores" / f"{unit}s"
        if not (scorers / "scorers.json").is_file():
            command = [*LAUNCH, "titan_attent.score", "pair", "--trusted", data / "trusted", "--output", scorers]
            run([*command, *options(size, folder), "--data.unit", unit], folder / f"scores_{unit}s.log")
        for table in scorers.rglob("table.bin"):
            table.unlink()  # 64 MiB each, read with level = "span" only
    print(f"{folder}: {num_tokens:,} tokens of training text", flush=True)


def options(size: Size, folder: Path) -> list[str]:
    """The options of every command."""
    data = folder.resolve() / "tokens"
    keys = {
        **{"data.path": data / "train", "data.validation_path": data / "validation", "model.flavor": size.flavor},
        **{"training.seq_len": size.seq_len, "training.local_batch_size": size.batch},
        **{"training.global_batch_size": size.batch, "training.mixed_precision_param": size.precision},
        **{"validation.seq_len": size.seq_len, "validation.local_batch_size": size.batch, "validation.steps": -1},
        **{"optimizer.lr": size.lr, "debug.seed": 0},
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [*CONFIG[:2], *words, "--checkpoint.no-enable"]


# -- part "steps" -----------------------------------------------------------------------------------------------------


def worker(size: Size, data: Path, variant: str) -> None:
    """Time the steps of one variant in this process, and print them as JSON."""
    import titan_attent.titan.patches.compat  # noqa: F401

    from torchtitan.protocols.train_spec import register_train_spec

    from benchmarks.speed.gpu_steps import PLANNED_STEPS, train
    from titan_attent.titan.launch import parse
    from titan_attent.titan.train_spec import attent_spec
    from titan_attent.titan.trainer import TeachingTrainer

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(random.randrange(20_000, 40_000))}
    register_train_spec("llama3_attent", attent_spec("llama3_attent"))
    suffix, *own = STEPS[variant]
    with tempfile.TemporaryDirectory() as folder:
        compiled = ["--compile.enable"] if size.compiled else []
        words = [*options(size, data), *own, "--model.flavor", size.flavor + suffix, "--job.dump_folder", folder]
        words += ["--training.steps", str(PLANNED_STEPS), "--metrics.log_freq", str(PLANNED_STEPS)]
        trainer = TeachingTrainer(parse([*words, *compiled, "--validation.no-enable"]))
        device = trainer.device.type
        batches, (steps, times) = trainer.batch_generator(trainer.dataloader), size.timed
        seconds = [measure.seconds(lambda: train(trainer, batches, steps), device=device) / steps for _ in range(times)]
        trainer.close()
    # The first time includes compilation.
    print("\n" + json.dumps({"device": device, "seconds": seconds[1:], "first": seconds[0] * steps}), flush=True)


def time_steps(args: argparse.Namespace, size: Size, results: dict[str, Any]) -> None:
    """Each variant ``--rounds`` times, in turns, in a process of its own."""
    done = results.setdefault("steps", {name: [] for name in STEPS})
    for number in range(args.rounds):
        for name in STEPS:
            if len(done[name]) > number:
                continue
            words = ["--worker", name, "--data", args.data, "--output", args.output, *rehearsed(args)]
            command = [sys.executable, "-m", "benchmarks.long_windows.gpu", *words]
            text, _ = run(command, args.output / "logs" / f"steps_{name.replace(', ', '_')}_{number}.log")
            done[name].append(json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{"))))
            save(args, results)
            print(f"{name}: {statistics.median(done[name][-1]['seconds']):.4f} s per step", flush=True)


def seconds_per_step(results: dict[str, Any], name: str) -> float:
    """The median over all rounds."""
    return statistics.median(value for one in results["steps"][name] for value in one["seconds"])


# -- part "train" -----------------------------------------------------------------------------------------------------


def train_rules(args: argparse.Namespace, size: Size, results: dict[str, Any]) -> None:
    """The runs that are not in the results yet."""
    steps = results.setdefault("planned", max(10, round(args.seconds / seconds_per_step(results, "windows"))))
    done = results.setdefault("train", {})
    for rule, scores in TRAINED.items():
        if rule in done:
            continue
        folder = args.output / "runs" / rule
        words: list[Any] = [*options(size, args.data), "--training.steps", steps, "--validation.freq", steps]
        words += ["--lr_scheduler.warmup_steps", max(1, steps // 20), "--job.dump_folder", folder]
        words += ["--compile.enable"] if size.compiled else []
        words += DOCUMENTS if rule == "documents" else ["--data.unit", "window"]
        words += ["--teacher.scores", args.data.resolve() / "scores" / scores] if scores else UNIFORM
        text, seconds = run([*LAUNCH, "titan_attent.train", *words], args.output / "logs" / f"{rule}.log")
        losses = dict(re.findall(r"validate step: +(\d+) +loss: +([0-9.]+)", text))
        done[rule] = {"loss": float(losses[str(steps)]), "seconds": seconds, "steps": steps}
        if scores:
            decided = json.loads((folder / "teacher" / "rounds.jsonl").read_text().splitlines()[0])
            done[rule] |= {"share": decided["teacher/ratio"], "repeats": decided["teacher/repeats"]}
        save(args, results)
        print(f"{rule}: {done[rule]}", flush=True)


# -- results ----------------------------------------------------------------------------------------------------------


def save(args: argparse.Namespace, results: dict[str, Any]) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The tables of what has run."""
    lines = []
    if all(results.get("steps", {}).values()) and "steps" in results:
        lines += ["| seconds per step | ratio | |", "|---|---|---|"]
        for name, (one, other) in RATIOS.items():
            ours, theirs = seconds_per_step(results, one), seconds_per_step(results, other)
            lines.append(f"| {name} | {ours / theirs:.3f} | {one} {ours:.4f} / {other} {theirs:.4f} |")
        lines.append("")
    if results.get("train"):
        lines += [
            "| rule | steps | loss | less uniform's | kept | repeats | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        uniform = results["train"].get("uniform", {}).get("loss", float("nan"))
        for rule, one in results["train"].items():
            kept, repeats = (f"{one[key]:.2f}" if key in one else "" for key in ("share", "repeats"))
            lines.append(
                f"| {rule} | {one['steps']:,} | {one['loss']:.4f} | {one['loss'] - uniform:+.4f} | {kept} | {repeats} "
                f"| {one['seconds']:.0f} |"
            )
    return "\n".join(lines)


def rehearsed(args: argparse.Namespace) -> list[str]:
    return ["--rehearse"] if args.rehearse else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_windows.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write the data and the scorers, and end")
    parser.add_argument("--data", type=Path, help="folder that --prepare wrote")
    parser.add_argument("--output", type=Path, default=Path("outputs/long_windows_gpu"), help="results, runs and logs")
    parser.add_argument("--parts", nargs="+", choices=("steps", "train"), default=["steps", "train"])
    parser.add_argument("--seconds", type=float, help="training time per rule (150; in a rehearsal 5)")
    parser.add_argument("--rounds", type=int, default=1, help="processes per variant of part steps")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU: checks that everything works")
    parser.add_argument("--publish", type=Path, help="write the tables and the results to PATH.md and PATH.json")
    parser.add_argument("--worker", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    size = REHEARSAL if args.rehearse else GPU
    args.seconds = args.seconds or (5.0 if args.rehearse else 150.0)
    if args.worker:
        worker(size, args.data, args.worker)
        return 0
    if args.prepare or args.rehearse:
        args.data = args.prepare or args.output / "data"
        prepare(size, args.data)
        if args.prepare:
            return 0
    if args.data is None:
        parser.error("--data is missing: name the folder that --prepare wrote")
    file = args.output / "results.json"
    results = json.loads(file.read_bytes()) if file.is_file() else measure.header() | {"seconds": args.seconds}
    started = time.monotonic()
    if "steps" in args.parts or "steps" not in results:
        time_steps(args, size, results)
    if "train" in args.parts:
        train_rules(args, size, results)
    text = page(results)
    print(f"\n{text}\n\n{time.monotonic() - started:.0f} s")
    if args.publish:
        head = f"# Long windows on a GPU\n\n    {results['command']}\n\n{results['machine']['gpu']}, {results['date']}"
        args.publish.with_suffix(".md").write_text(f"{head}\n\n{text}\n", encoding="utf-8")
        args.publish.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(str(error))
