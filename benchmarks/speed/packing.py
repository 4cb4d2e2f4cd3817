"""Packing documents into training windows: its time against reading the documents and against textbook packing, and
the padding and the cut documents that it leaves, against concatenation and padding.

    python -m benchmarks.speed.packing [--output packing.json]

Time: 65,536 documents in windows of 8,192 tokens; log-normal lengths of mean 1,000 (sigma 1), and the headers below.
One thread:

    best_fit, num_windows, window_limit   titan_attent.data.plan.packing
    read_windows                          65,536 reads of 1,000 tokens at random places of 4 token shards (64 MB in the
                                          page cache), in batches of 64: what a training run calls
    pread                                 the same reads by os.pread alone, without making arrays
    best fit, one by one                  best-fit decreasing with a sorted list of the free tokens, without a limit
    first fit                             the plain loop: each document, in its given order, into the first window that
                                          holds it

Padding: four kinds of real text that a Python installation carries, so that nothing is downloaded; lengths in tokens of
one byte-level BPE of 4,096 tokens trained on a sample of all four, one eos included:

    modules      source files of the installed packages
    functions    functions, methods and classes of the standard library, nested ones included
    docstrings   docstrings of the standard library
    headers      C and C++ headers of the installed packages, most of them torch's

65,536 documents of each are drawn with replacement, so that all have the same number. Where windows are padded,
documents longer than a window are first cut into spans of a window's tokens. Blocks of 65,536 spans are packed, each by
itself, with the limit that window_limit gives for the first block. The lengths depend on the versions of Python and of
the packages.
"""

import argparse
import ast
import os
import sysconfig
import tempfile
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import measure
from benchmarks.corpora.stdlib_code import list_sources
from benchmarks.speed.reading import DTYPE, TOKENS, make_data
from titan_attent.data.plan.packing import best_fit, concatenate, num_windows, window_limit
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tiktoken_tokenizer import train_tokenizer

NUM = 65_536
"""Documents of a distribution, and examples of a block."""
CAPACITIES = (1024, 2048, 8192)
TOKENS_READ = 1000
VOCAB_SIZE = 4096


# -- lengths ----------------------------------------------------------------------------------------------------------


def installed(suffixes: Sequence[str], *, max_files: int, seed: int) -> list[str]:
    """The text of at most ``max_files`` random files of the installed packages, every content once."""
    root = Path(sysconfig.get_paths()["purelib"])
    paths = sorted(path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
    texts: dict[str, None] = {}
    for i in np.random.default_rng(seed).permutation(len(paths)):
        if len(texts) == max_files:
            break
        text = paths[i].read_bytes().decode("utf-8", errors="ignore")
        if text.strip():
            texts[text] = None
    return list(texts)


def definitions(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(source, docstring) of every function and class of the sources; the docstring may be empty."""
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # list_sources cuts long files
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield "".join(lines[node.lineno - 1 : node.end_lineno]), ast.get_docstring(node) or ""


def texts_of_installation(*, max_files: int) -> dict[str, list[str]]:
    """The documents of each kind, every content once."""
    pairs = list(definitions(list_sources().values()))
    return {
        "modules": installed([".py"], max_files=max_files, seed=0),
        "functions": list(dict.fromkeys(source for source, _ in pairs)),
        "docstrings": list(dict.fromkeys(docstring for _, docstring in pairs if docstring.strip())),
        "headers": installed([".h", ".hpp", ".cuh"], max_files=max_files, seed=1),
    }


def train(texts: dict[str, list[str]], *, characters: int = 2_000_000) -> Tokenizer:
    """A tokenizer of equally many characters of every kind."""
    sample: list[str] = []
    for documents in texts.values():
        left = characters
        for document in documents:
            if left <= 0:
                break
            sample.append(document[:left])
            left -= len(document)
    return train_tokenizer(sample, vocab_size=VOCAB_SIZE)


def token_lengths(texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """int64 per kind: tokens of every document, its eos included."""
    tokenizer = train(texts)
    return {
        kind: np.array([len(tokenizer.encode_to_array(document)) + 1 for document in documents], dtype=np.int64)
        for kind, documents in texts.items()
    }


def draw(lengths: np.ndarray, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(lengths, NUM)


def spans_of(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """Documents cut every ``capacity`` tokens; the spans shuffled."""
    num_full, left = lengths // capacity, lengths % capacity
    spans = np.concatenate([np.full(num_full.sum(), capacity, dtype=np.int64), left[left > 0]])
    return np.random.default_rng(2).permutation(spans)


# -- padding and cut documents ----------------------------------------------------------------------------------------


def losses(lengths: np.ndarray, *, capacity: int) -> list[dict[str, Any]]:
    """For each way of packing: windows, the share that is padding, and the share of documents and tokens cut."""
    num_tokens, spans = int(lengths.sum()), spans_of(lengths, capacity=capacity)
    blocks = [spans[i : i + NUM] for i in range(0, len(spans), NUM)]
    limit = window_limit(blocks[0], capacity=capacity)
    packed = [num_windows(block, capacity=capacity, max_examples=limit) for block in blocks]
    # Both ways that pad cut only documents that are longer than a window.
    cut = {
        "documents_cut": float((lengths > capacity).mean()),
        "tokens_without_start": float(np.maximum(lengths - capacity, 0).sum() / num_tokens),
    }

    def padded(way: str, windows: int, **more: Any) -> dict[str, Any]:
        return {"way": way, "windows": windows, "padding": 1 - num_tokens / (windows * capacity), **cut, **more}

    pieces = concatenate(lengths, capacity=capacity)
    continued = pieces.firsts > 0
    one_by_one = {
        "way": "concatenate",
        "windows": len(pieces.starts) - 1,
        "padding": 0.0,
        "documents_cut": len(np.unique(pieces.slots[continued])) / len(lengths),
        "tokens_without_start": float((pieces.stops - pieces.firsts)[continued].sum() / num_tokens),
    }
    first_block = {"max_examples": limit, "first_block_fill": int(blocks[0].sum()) / (packed[0] * capacity)}
    return [padded("best_fit", sum(packed), **first_block), one_by_one, padded("pad each", len(spans))]


# -- time -------------------------------------------------------------------------------------------------------------


def first_fit(lengths: Sequence[int], *, capacity: int) -> int:
    spaces: list[int] = []
    for length in lengths:
        for w, space in enumerate(spaces):
            if space >= length:
                spaces[w] = space - length
                break
        else:
            spaces.append(capacity - length)
    return len(spaces)


def best_fit_one_by_one(lengths: Sequence[int], *, capacity: int) -> list[tuple[int, list[int]]]:
    """Best-fit decreasing; the free tokens and the slots of every window."""
    windows: list[tuple[int, list[int]]] = []
    for slot in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[slot]
        w = bisect_left(windows, (length,))
        space, slots = windows.pop(w) if w < len(windows) else (capacity, [])
        slots.append(slot)
        insort(windows, (space - length, slots))
    return windows


def readers(folder: Path) -> tuple[dict[str, Callable[[], Any]], Callable[[], None]]:
    """The two ways to read a block's tokens, and a function that draws other places for both."""
    shards = TokenShards(make_data(folder, num_shards=4))
    generator, starts = np.random.default_rng(0), np.empty(NUM, dtype=np.int64)
    files = [os.open(folder / shard.file, os.O_RDONLY) for shard in shards.index.shards]
    shard_tokens = TOKENS // len(files)

    def draw_places() -> None:
        starts[:] = generator.integers(0, TOKENS - TOKENS_READ, NUM)

    def read_windows() -> None:
        for i in range(0, NUM, 64):
            shards.read_windows(starts[i : i + 64].tolist(), length=TOKENS_READ)

    def pread() -> None:
        size = TOKENS_READ * DTYPE.itemsize
        for start in starts.tolist():
            shard, offset = divmod(start, shard_tokens)
            os.pread(files[shard], size, offset * DTYPE.itemsize)

    return {"read_windows": read_windows, "pread": pread}, draw_places


def times_of(blocks: dict[str, np.ndarray], *, rounds: int, slow_rounds: int) -> list[dict[str, Any]]:
    """For each block of lengths and each way: seconds, and their ratio to best_fit's in the same turns."""
    rows, capacity = [], 8192
    for name, lengths in blocks.items():
        limit, listed = window_limit(lengths, capacity=capacity), lengths.tolist()
        sizes = {"capacity": capacity, "max_examples": limit}
        pack, one_by_one = partial(best_fit, lengths, **sizes), partial(best_fit_one_by_one, listed, capacity=capacity)
        plain = partial(first_fit, listed, capacity=capacity)
        with tempfile.TemporaryDirectory() as temporary:
            reading, draw_places = readers(Path(temporary) / "data")
            ways: dict[str, Callable[[], Any]] = {
                "best_fit": pack,
                "num_windows": partial(num_windows, lengths, **sizes),
                "window_limit": partial(window_limit, lengths, capacity=capacity),
                **reading,
                "best fit, one by one": one_by_one,
            }
            fast = measure.interleave(ways, rounds=rounds, device="cpu", before=draw_places)
        slow = measure.interleave({"best_fit": pack, "first fit": plain}, rounds=slow_rounds, device="cpu", warmup=0)
        num = {"best_fit": len(pack().starts) - 1, "best fit, one by one": len(one_by_one()), "first fit": plain()}
        for way, times, ours in (
            *((way, fast[way], fast["best_fit"]) for way in fast),
            ("first fit", slow["first fit"], slow["best_fit"]),
        ):
            ratio = measure.summary(times)["seconds"] / measure.summary(ours)["seconds"]
            facts = {"lengths": name, "mean": float(lengths.mean()), "max_examples": limit, "way": way}
            rows.append(facts | measure.summary(times) | {"times_best_fit": ratio, "windows": num.get(way)})
    return rows


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description="Packing against reading, and against other ways of packing.")
    parser.add_argument("--rounds", type=int, default=11, help="calls of each way; first fit has --slow-rounds")
    parser.add_argument("--slow-rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=6000, help="source files and headers read of the packages")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    header = measure.header()

    texts = texts_of_installation(max_files=args.files)
    lengths = token_lengths(texts)
    drawn = {kind: draw(lengths[kind], seed=seed) for seed, kind in enumerate(lengths)}
    texts_rows = [
        {
            "text": kind,
            "documents": len(of),
            "mean": float(of.mean()),
            "median": int(np.median(of)),
            "max": int(of.max()),
        }
        for kind, of in lengths.items()
    ]
    losses_rows = [
        {"text": kind, "capacity": capacity, **row}
        for kind in drawn
        for capacity in CAPACITIES
        for row in losses(drawn[kind], capacity=capacity)
    ]
    sizes = np.random.default_rng(3).lognormal(np.log(1000) - 0.5, 1.0, NUM)
    blocks = {
        "log-normal": np.clip(sizes, 1, 8192).astype(np.int64),
        "headers": spans_of(drawn["headers"], capacity=8192)[:NUM],
    }
    time_rows = times_of(blocks, rounds=args.rounds, slow_rounds=args.slow_rounds)

    shown_times = [
        {
            "lengths": f"{row['lengths']}, mean {row['mean']:.0f}",
            "way": row["way"],
            "ms": 1e3 * row["seconds"],
            "spread": f"{row['spread']:.0%}",
            "times best_fit": row["times_best_fit"],
            "windows": "" if row["windows"] is None else row["windows"],
        }
        for row in time_rows
    ]
    shown_losses = [
        {
            "text": row["text"],
            "capacity": row["capacity"],
            "way": row["way"],
            "max_examples": row.get("max_examples", ""),
            "windows": row["windows"],
            "padding": percent(row["padding"]),
            "documents cut": percent(row["documents_cut"]),
            "tokens without their document's start": percent(row["tokens_without_start"]),
        }
        for row in losses_rows
    ]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    result = header | {"settings": settings, "texts": texts_rows, "times": time_rows, "losses": losses_rows}
    measure.publish(args.output, result, texts_rows, shown_times, shown_losses)


if __name__ == "__main__":
    main()
