"""Reading packed windows of documents: against torchtitan's text loader, mosaicml-streaming, and plain reads.

    python -m benchmarks.speed.documents [--streaming-python PYTHON] [--output documents_speed.json]

Part "text": source files of the installed packages, in windows of 8,192 tokens, eight windows per batch.

    torchtitan    HuggingFaceTextDataset and ParallelAwareDataloader: reads a jsonl with ``datasets``, and encodes
    ours          Packer, sampler, reader thread and DocumentDataset, as the loader of a run: the same documents with
                  the same ids, encoded before

Part "documents": 100,000 documents of random ids, log-normal lengths of mean 1,000 (sigma 1), in random order.

    streaming     StreamingDataset of mosaicml-streaming: samples of uint16 ids, shuffled, without collation
    ours          as above: packed windows of int64 inputs, labels and example_index
    pread         the same bytes in the same order by os.preadv into one buffer, without making arrays
    pread, rows   the same, and the int64 arrays of each batch by one copy each

Each variant is a whole process on one core, and the processes take turns. The time is that of one pass, from the
request for the first batch: for ours it includes the table of spans and the packing. All files are in the page cache.
Seconds of CPU are given, too: on a shared machine they depend less on other work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from benchmarks.common import measure
from benchmarks.speed.packing import installed
from titan_attent.data.io.reader import Reader
from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.format import ShardWriter, write_index

SEQ_LEN, ROWS = 8192, 8
EOS, VOCAB_SIZE = "<|endoftext|>", 4096
DTYPE = np.dtype("<u2")
NUM_DOCUMENTS, NUM_SHARDS = 100_000, 4


# -- data -------------------------------------------------------------------------------------------------------------


def write_documents(folder: Path, documents: Iterator[np.ndarray], *, vocab_size: int, eos_id: int) -> None:
    """A data set of documents, each with its eos, in shards of equal numbers of documents."""
    folder.mkdir(parents=True)
    shards = [ShardWriter(folder / f"shard-{number:05d}.bin", dtype=DTYPE) for number in range(NUM_SHARDS)]
    num = 0
    for num, tokens in enumerate(documents, start=1):
        shards[num % NUM_SHARDS].append_document(tokens)
    entries = [shard.finish() for shard in shards]
    info = {"name": "none", "vocab_size": vocab_size, "eos_id": eos_id}
    write_index(folder, dtype=DTYPE, shards=entries, num_documents=num, max_token_id=vocab_size - 1, tokenizer=info)


def make_text(folder: Path, *, max_files: int) -> None:
    """text.jsonl, tokenizer.json, and the same documents as a data set with the ids of that tokenizer."""
    texts = installed([".py"], max_files=max_files, seed=0)
    (folder / "jsonl").mkdir(parents=True)
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "jsonl" / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((text[:20_000] for text in texts[:200]), trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}), encoding="utf-8")
    eos_id = tokenizer.token_to_id(EOS)
    encoded = (np.array([*tokenizer.encode(text).ids, eos_id]) for text in texts)
    write_documents(folder / "tokens", encoded, vocab_size=tokenizer.get_vocab_size(), eos_id=eos_id)


def make_documents(folder: Path) -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(1000) - 0.5, 1.0, NUM_DOCUMENTS), 2, SEQ_LEN).astype(np.int64)

    def documents() -> Iterator[np.ndarray]:
        for length in lengths.tolist():
            tokens = generator.integers(0, 49_999, length, dtype=DTYPE)
            tokens[-1] = 49_999
            yield tokens

    write_documents(folder / "tokens", documents(), vocab_size=50_000, eos_id=49_999)


# -- the processes ----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds and seconds of CPU since its start."""

    def __init__(self) -> None:
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def result(self, *, tokens: int) -> dict[str, float]:
        seconds, cpu_seconds = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        return {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}


def open_pass(folder: Path) -> tuple[DocumentDataset, TeachingSampler]:
    dataset = DocumentDataset(folder / "tokens", seq_len=SEQ_LEN)
    packer = Packer(dataset, batch_size=ROWS)
    return dataset, TeachingSampler(Shuffled(len(dataset), batch_size=ROWS, seed=0, packer=packer))


def read_ours(folder: Path) -> dict[str, float]:
    reader = Reader(1)
    clock = Clock()
    dataset, sampler = open_pass(folder)
    current = sampler.current_pass()

    def read(place: tuple[int, int]) -> Any:
        ids = sampler.local_ids(current, *place)
        inputs, labels = dataset.read(ids, current.visit_key)
        return {**inputs, "example_id": ids}, labels

    num_rows = 0
    for _, labels in reader.read(read, sampler.local_microbatches(current, start=0)):
        num_rows += len(labels)
    # Without padding; the windows that fill no batch are not read.
    result = clock.result(tokens=dataset.num_pairs * num_rows // current.num_windows)  # type: ignore[union-attr]
    reader.close()
    return result


def read_torchtitan(folder: Path, *, max_tokens: int = 3_000_000) -> dict[str, float]:
    from datasets import load_dataset, utils
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    utils.disable_progress_bars()

    def load(path: str) -> Any:
        return load_dataset(path, split="train", cache_dir=str(folder / "cache"))

    text_datasets.DATASETS["local"] = DatasetConfig("", load, lambda sample: sample["text"])
    tokenizer = HuggingFaceTokenizer(str(folder / "tokenizer"))
    dataset = text_datasets.HuggingFaceTextDataset("local", str(folder / "jsonl"), tokenizer, seq_len=SEQ_LEN)
    loader = ParallelAwareDataloader(dataset, dp_rank=0, dp_world_size=1, batch_size=ROWS)
    clock, num_tokens = Clock(), 0
    for _, labels in loader:
        num_tokens += labels.numel()
        if num_tokens >= max_tokens:
            break
    return clock.result(tokens=num_tokens)


def read_plain(folder: Path, *, make_rows: bool) -> dict[str, float]:
    dataset, sampler = open_pass(folder)
    current = sampler.current_pass()
    files = [os.open(folder / "tokens" / shard.file, os.O_RDONLY) for shard in dataset.shards.index.shards]
    batches, num_tokens = [], 0
    for batch in range(current.num_batches):
        ids = sampler.local_ids(current, batch, 0).numpy().reshape(-1)
        spans = dataset.table.locate(ids[ids < len(dataset)])
        size = DTYPE.itemsize
        columns = (spans.shards, spans.starts * size, (spans.lengths + 1) * size)
        batches.append(list(zip(*(column.tolist() for column in columns), strict=True)))
        num_tokens += int(spans.lengths.sum())
    tokens = np.zeros((ROWS, SEQ_LEN + 1), dtype=DTYPE)
    buffer = memoryview(tokens.reshape(-1).view(np.uint8))
    clock = Clock()
    for parts in batches:
        for shard, offset, size in parts:
            os.preadv(files[shard], (buffer[:size],), offset)
        if make_rows:
            inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
            (torch.from_numpy(inputs), torch.from_numpy(labels), torch.zeros(labels.shape, dtype=torch.int64))
    return clock.result(tokens=num_tokens)


WORKERS: dict[str, Callable[[Path], dict[str, float]]] = {
    "ours": read_ours,
    "torchtitan": read_torchtitan,
    "pread": lambda folder: read_plain(folder, make_rows=False),
    "pread, rows": lambda folder: read_plain(folder, make_rows=True),
}


# -- the comparison ---------------------------------------------------------------------------------------------------


def run(command: list[str]) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=measure.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, commands: dict[str, list[str]], *, rounds: int, part: str) -> list[dict[str, Any]]:
    """For each variant: the medians of its tokens per second, and ours as a multiple of them in the same rounds."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    names = list(commands)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            results[name].append(run(commands[name]))
            print(part, name, results[name][-1], file=sys.stderr, flush=True)
    rows = []
    for name, all_of in results.items():
        row: dict[str, Any] = {"part": part, "way": name, "rounds": rounds}
        for key, unit in (("seconds", "tokens_per_second"), ("cpu_seconds", "tokens_per_cpu_second")):
            rates = np.array([one["tokens"] / one[key] for one in all_of])
            ours = np.array([one["tokens"] / one[key] for one in results["ours"]])
            row |= {unit: float(np.median(rates)), f"{unit}_min": rates.min(), f"{unit}_max": rates.max()}
            row[f"ours_to_{unit}"] = float(np.median(ours) / np.median(rates))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed windows of documents against other loaders.")
    parser.add_argument("--rounds", type=int, default=5, help="processes per variant")
    parser.add_argument("--files", type=int, default=1500, help="source files of part text")
    parser.add_argument("--core", type=int, default=0, help="the core on which every process runs")
    parser.add_argument("--streaming-python", help="an interpreter with mosaicml-streaming; without it, no such row")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        os.sched_setaffinity(0, {args.core})
        torch.set_num_threads(1)
        print(json.dumps(WORKERS[args.worker](args.folder)), flush=True)
        return

    header, rows = measure.header(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        core = ["--core", str(args.core)]
        make_text(folder / "text", max_files=args.files)
        make_documents(folder / "documents")

        def worker(name: str, part: str) -> list[str]:
            module = ["-m", "benchmarks.speed.documents"]
            return [sys.executable, *module, "--worker", name, "--folder", str(folder / part), *core]

        commands = {name: worker(name, "text") for name in ("torchtitan", "ours")}
        rows += compare(folder, commands, rounds=args.rounds, part="text")
        commands = {name: worker(name, "documents") for name in ("ours", "pread", "pread, rows")}
        if args.streaming_python:
            script = [args.streaming_python, "benchmarks/speed/documents_streaming.py"]
            mds, tokens = str(folder / "mds"), str(folder / "documents" / "tokens")
            subprocess.run([*script, "write", tokens, mds], cwd=measure.ROOT, check=True)
            commands["streaming"] = [*script, "read", mds, *core]
        rows += compare(folder, commands, rounds=args.rounds, part="documents")
    shown = [
        {
            "part": row["part"],
            "way": row["way"],
            "million tokens per second": row["tokens_per_second"] / 1e6,
            "ours": row["ours_to_tokens_per_second"],
            "million tokens per CPU second": row["tokens_per_cpu_second"] / 1e6,
            "ours, CPU": row["ours_to_tokens_per_cpu_second"],
        }
        for row in rows
    ]
    settings = {key: value for key, value in vars(args).items() if key in ("rounds", "files", "core")}
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
