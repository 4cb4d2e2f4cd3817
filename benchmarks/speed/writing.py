"""Writing text: against bare ``encode_ordinary_batch`` on the same text, and datatrove's DocumentTokenizer; its memory.

    python -m benchmarks.speed.writing [--datatrove-python PYTHON] [--output docs/results/cpu/writing.json]
    python -m benchmarks.speed.writing --parts memory --gigabytes 0.5 10 --formats jsonl parquet

Part "speed": source files of the installed packages in eight .jsonl files, with a tokenizer trained on some of them.
The writer reads, parses, encodes, hashes and writes; the ends of documents belong to every data set. The records become
documents in four ways:

    text       the key of the text
    template   "# {title}\\n\\n{text}"
    pairs      the same template with --completion-key: encoded in two parts, and a mask
    messages   a conversation of two turns in chatml: encoded in six parts, and a mask

"bare" is tiktoken's encode_ordinary_batch on the documents of the same way, which lie in memory: no files, no hashes.
"ours, tokenizer.json" writes the same ids by Hugging Face's tokenizers, as it does for the tokenizer of a model.
datatrove reads the same files with the same vocabulary, as Hugging Face's tokenizers have it, in two ways to use the
cores: a worker per core, or one whose tokenizer has a thread per core. Both write token files in the order of the
documents. Each variant is a process of its own on the same cores, and the processes take turns. The time begins after
the imports.

Part "memory": one file of each size and format, of the same documents again and again, is written on two threads. The
peak of the process's memory is given with and without the pages of mapped files, which the kernel may drop.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pyarrow
import pyarrow.parquet
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.common import measure
from benchmarks.speed.documents import run
from benchmarks.speed.packing import installed
from titan_attent.data.text.bpe import format_ranks, parse_ranks, train_ranks
from titan_attent.data.text.tiktoken_tokenizer import EOS, SPLIT_PATTERN
from titan_attent.data.text.writer import write_dataset

BY = ("bare", "ours", "ours, tokenizer.json")
NUM_FILES, VOCAB_SIZE, TRAINING_BYTES = 8, 32_768, 2**24
PARTS, FORMATS = ("speed", "memory"), ("jsonl", "jsonl.zst", "json", "parquet", "arrow")
TEMPLATE = "# {title}\n\n{text}"
OPTIONS: dict[str, dict[str, Any]] = {
    "text": {},
    "template": {"templates": {"": TEMPLATE}},
    "pairs": {"templates": {"": TEMPLATE}, "completion_key": "text"},
    "messages": {"messages_key": "messages", "chat_template": "chatml"},
}
"""Way -> the writer's options."""


# -- data -------------------------------------------------------------------------------------------------------------


def make_records(num_bytes: int) -> list[dict[str, Any]]:
    """Records of at most ``num_bytes`` of text, each with a title, and as a conversation, too."""
    records: list[dict[str, Any]] = []
    for number, text in enumerate(installed([".py"], max_files=10**6, seed=0)):
        num_bytes -= len(text.encode())
        if num_bytes < 0:
            break
        title = f"Source {number}"
        turns = [{"role": "user", "content": title}, {"role": "assistant", "content": text}]
        records.append({"title": title, "text": text, "messages": turns})
    return records


def make_inputs(folder: Path, records: list[dict[str, Any]]) -> None:
    """The files of part speed, and the tokenizer as a rank file and as tokenizer.json."""
    (folder / "jsonl").mkdir()
    for part in range(NUM_FILES):
        lines = (json.dumps(record) + "\n" for record in records[part::NUM_FILES])
        (folder / "jsonl" / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts, num_bytes = list[str](), 0
    for record in records:
        texts.append(record["text"])
        num_bytes += len(record["text"])
        if num_bytes > TRAINING_BYTES:
            break
    ranks = train_ranks(texts, num_ranks=VOCAB_SIZE - 1, pattern=SPLIT_PATTERN)
    (folder / "ranks.tiktoken").write_bytes(format_ranks(ranks))
    hugging_face_tokenizer(ranks).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}), encoding="utf-8")


def hugging_face_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """The tokenizer of Hugging Face with the ids of ``ranks``, and eos as the next."""
    characters = characters_of_bytes()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [
        tuple(map(written, halves(token, ranks))) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    ]
    model = models.BPE(vocab={written(token): rank for token, rank in ranks.items()}, merges=merges)
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair that is merged into ``token``: what the merges before it leave of its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def characters_of_bytes() -> list[str]:
    """GPT-2's printable character of every byte: itself, or, for those not printable, the next one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def make_file(path: Path, texts: list[str], *, num_bytes: int) -> None:
    """One file in the format of its name, of ``texts`` again and again until these have ``num_bytes``."""

    def batches() -> Iterator[list[str]]:
        batch, left = list[str](), num_bytes
        for text in cycle(texts):
            batch.append(text)
            left -= len(text)
            if left < 0 or len(batch) == 1000:
                yield batch
                batch = []
            if left < 0:
                return

    if path.suffix in (".parquet", ".arrow"):
        schema = pyarrow.schema([("text", pyarrow.string())])
        new = pyarrow.parquet.ParquetWriter if path.suffix == ".parquet" else pyarrow.ipc.new_stream
        with new(str(path), schema) as writer:
            for batch in batches():
                writer.write_table(pyarrow.table({"text": batch}, schema))
        return
    is_list = path.suffix == ".json"
    compression = "zstd" if path.suffix == ".zst" else None
    with pyarrow.output_stream(str(path), compression=compression) as file:
        for number, batch in enumerate(batches()):
            lines = [json.dumps({"text": text}) for text in batch]
            file.write(
                (("[" if number == 0 else ",") + ",".join(lines) if is_list else "\n".join([*lines, ""])).encode()
            )
        file.write(b"]" if is_list else b"")


# -- the processes ----------------------------------------------------------------------------------------------------


def encode_bare(folder: Path, way: str, threads: int) -> dict[str, float]:
    lines = [line for path in sorted((folder / "jsonl").iterdir()) for line in path.read_text("utf-8").splitlines()]
    documents = [document_of(json.loads(line), way) for line in lines]
    path = folder / "ranks.tiktoken"
    ranks = parse_ranks(path.read_bytes(), path=path)
    encoding = tiktoken.Encoding("ranks", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    encoding.encode_ordinary(documents[0])
    start, num_tokens = time.perf_counter(), 0
    for first in range(0, len(documents), 1000):
        batch = encoding.encode_ordinary_batch(documents[first : first + 1000], num_threads=threads)
        num_tokens += sum(map(len, batch)) + len(batch)
    return {"tokens": num_tokens, "seconds": time.perf_counter() - start}


def document_of(record: dict[str, Any], way: str) -> str:
    if way == "text":
        return record["text"]
    if way in ("template", "pairs"):
        return TEMPLATE.format(**record)
    turns = (f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>" for turn in record["messages"])
    return "\n".join(turns)


def write(folder: Path, way: str, threads: int, *, tokenizer: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        start = time.perf_counter()
        summary = write_dataset(
            [folder / "jsonl"],
            output=Path(temporary) / "out",
            tokenizer=str(folder / tokenizer),
            num_threads=threads,
            **OPTIONS[way],
        )
        return {"tokens": summary.num_tokens, "seconds": time.perf_counter() - start}


def write_measured(path: Path, tokenizer: str) -> dict[str, float]:
    """Write the one file ``path`` on two threads, and sample the memory of this process."""
    stop, anonymous = threading.Event(), [0]

    def sample() -> None:
        while not stop.wait(0.05):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
            anonymous[0] = max(anonymous[0], now)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        summary = write_dataset([path], output=Path(temporary) / "out", tokenizer=tokenizer, num_threads=2)
    stop.set()
    sampler.join()
    seconds, peak = time.perf_counter() - start, measure.rss_bytes(peak=True)
    return {"tokens": summary.num_tokens, "seconds": seconds, "peak_bytes": peak, "anonymous_bytes": anonymous[0]}


# -- the comparison ---------------------------------------------------------------------------------------------------


def speed(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    records = make_records(args.megabytes * 10**6)
    make_inputs(folder, records)
    this = [sys.executable, "-m", "benchmarks.speed.writing", "--folder", str(folder)]
    commands: dict[tuple[str, str, int], list[str]] = {}
    for threads in range(1, len(args.cores) + 1):
        cores = ["--cores", *map(str, args.cores[:threads])]
        for way in args.ways:
            for name in args.by:
                commands[name, way, threads] = [*this, "--worker", name, "--way", way, *cores]
    if args.datatrove_python:
        script = [args.datatrove_python, "benchmarks/speed/writing_datatrove.py", str(folder)]
        for workers in {1, len(args.cores)}:
            cores = ["--workers", str(workers), "--cores", *map(str, args.cores)]
            commands[f"datatrove, {workers} workers", "text", len(args.cores)] = [*script, *cores]
    results: dict[tuple[str, str, int], list[dict[str, float]]] = {key: [] for key in commands}
    keys = list(commands)
    for number in range(args.rounds):
        first = number * 3 % len(keys)
        for key in keys[first:] + keys[:first]:
            results[key].append(run(commands[key]))
            print(*key, results[key][-1], file=sys.stderr, flush=True)
    rows = []
    for (name, way, threads), all_of in results.items():
        times = [one["seconds"] for one in all_of]
        bare = statistics.median(one["seconds"] for one in results["bare", way, threads])
        ours = statistics.median(one["seconds"] for one in results["ours", way, threads])
        median = statistics.median(times)
        rows.append(
            {
                **{"way": way, "threads": threads, "by": name, "tokens": int(all_of[0]["tokens"])},
                **{"seconds": median, "times": times, "of bare": median / bare, "of ours": median / ours},
            }
        )
    return sorted(rows, key=lambda row: (row["threads"], row["way"]))


def memory(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    texts = [record["text"] for record in make_records(2 * 10**7)]
    tokenizer = folder / "memory.tiktoken"
    tokenizer.write_bytes(format_ranks(train_ranks(texts[:500], num_ranks=VOCAB_SIZE - 1, pattern=SPLIT_PATTERN)))
    rows = []
    for kind in args.formats:
        for gigabytes in args.gigabytes:
            path = folder / f"memory.{kind}"
            make_file(path, texts, num_bytes=int(gigabytes * 1e9))
            this = [sys.executable, "-m", "benchmarks.speed.writing", "--worker", "memory", "--folder", str(path)]
            result = run([*this, "--cores", *map(str, args.cores)])
            rows.append(
                {
                    **{"format": kind, "GB of text": gigabytes, "GB of file": path.stat().st_size / 1e9},
                    **{
                        "MiB": int(result["peak_bytes"]) >> 20,
                        "MiB without files": int(result["anonymous_bytes"]) >> 20,
                    },
                    **{"seconds": result["seconds"], "tokens": int(result["tokens"])},
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
            path.unlink()
    return rows


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "bare": lambda args: encode_bare(args.folder, args.way, len(args.cores)),
    "ours": lambda args: write(args.folder, args.way, len(args.cores), tokenizer="ranks.tiktoken"),
    "ours, tokenizer.json": lambda args: write(args.folder, args.way, len(args.cores), tokenizer="tokenizer.json"),
    "memory": lambda args: write_measured(args.folder, str(args.folder.parent / "memory.tiktoken")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The text writer's speed and memory.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["speed"])
    parser.add_argument("--megabytes", type=int, default=100, help="of text, part speed")
    parser.add_argument("--ways", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="part speed")
    parser.add_argument("--by", nargs="+", choices=BY, default=list(BY), help="part speed; bare and ours are needed")
    parser.add_argument("--rounds", type=int, default=5, help="processes per variant")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="the writer has a thread for each")
    parser.add_argument("--datatrove-python", help="an interpreter with datatrove; without it, no such rows")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 2], help="of text, part memory")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["jsonl"], help="part memory")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=list(OPTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        os.sched_setaffinity(0, args.cores)
        print(json.dumps(WORKERS[args.worker](args)), flush=True)
        return
    if not {"bare", "ours"} <= set(args.by):
        parser.error("--by needs bare and ours, with which everything is compared")
    header = measure.header()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        speeds = speed(folder, args) if "speed" in args.parts else []
        memories = memory(folder, args) if "memory" in args.parts else []
    hidden = ("times",)
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in speeds]
    shown_settings = ("parts", "megabytes", "rounds", "cores", "ways", "by")
    settings = {key: value for key, value in vars(args).items() if key in shown_settings}
    result = header | {"settings": settings, "speed": speeds, "memory": memories}
    measure.publish(args.output, result, *(rows for rows in (shown, memories) if rows))


if __name__ == "__main__":
    main()
