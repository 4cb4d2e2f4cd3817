"""Scoring 10^9 examples on 512 and 1,024 ranks: counts of padded rows, gathers and file system calls."""

import builtins
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch

from titan_attent.scores.stored import Scoring, StoredScores
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan.scoring.write_losses import ScoringChunks

NUM_EXAMPLES = 10**9
WORLDS = [(512, 16), (1024, 32)]
CALLS_PER_CHUNK = {"open": 3, "fsync": 3, "replace": 1}
"""The losses, scoring.json, and the folder of scoring.json, which is synced to make the name durable."""


class FileCalls:
    """Counts the calls of the file system below ``folder``, in the calling thread (0) and in others (1)."""

    def __init__(self, folder: Path):
        self.folder, self.caller, self.listdir = str(folder), get_ident(), os.listdir
        self.num_calls, self.read, self.written, self.max_files = Counter[str](), [0, 0], [0, 0], 0

    def thread(self) -> int:
        return int(get_ident() != self.caller)

    def counted(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, int) or os.fspath(path).startswith(self.folder):
                self.num_calls[name] += 1
            return stock(path, *args, **kwargs)

        return call

    def open(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        counted = self.counted("open", stock)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            file = counted(path, *args, **kwargs)
            inside = not isinstance(path, int) and os.fspath(path).startswith(self.folder)
            return CountedFile(file, self) if inside else file

        return call

    def replace(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        counted = self.counted("replace", stock)

        def call(*args: Any) -> None:
            self.max_files = max(self.max_files, len(self.listdir(self.folder)))
            counted(*args)

        return call


class CountedFile:
    def __init__(self, file: Any, calls: FileCalls):
        self.file, self.counts = file, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def read(self, *args: Any) -> bytes:
        data = self.file.read(*args)
        self.counts.read[self.counts.thread()] += len(data)
        return data

    def write(self, data: Any) -> int:
        self.counts.written[self.counts.thread()] += memoryview(data).nbytes
        return self.file.write(data)


@contextmanager
def counting(folder: Path) -> Iterator[FileCalls]:
    calls = FileCalls(folder)
    names = ("fsync", "rename", "remove", "unlink", "rmdir", "listdir", "scandir", "truncate", "ftruncate", "link")
    with (
        mock.patch.object(builtins, "open", calls.open(builtins.open)),
        mock.patch.object(io, "open", calls.open(io.open)),
        mock.patch.object(os, "open", calls.counted("open", os.open)),
        mock.patch.object(os, "replace", calls.replace(os.replace)),
        mock.patch.multiple("os", **{name: calls.counted(name, getattr(os, name)) for name in names}),
    ):
        yield calls


def scoring_of(num_examples: int) -> Scoring:
    return Scoring(
        **{"data_fingerprint": "f" * 64, "seq_len": 8192, "num_examples": num_examples, "model": "llama3_attent 8B"},
        **{"precision": "bfloat16", "checkpoint": "/" + "c" * 100, "checkpoint_sha256": "c" * 64},
    )


@pytest.mark.parametrize(("num_ranks", "batch_size"), WORLDS)
@pytest.mark.parametrize("start", [0, 65536 * 4711])
def test_padding_and_gathers(num_ranks: int, batch_size: int, start: int) -> None:
    chunks = ScoringChunks(start=start, num_examples=NUM_EXAMPLES, batch_size=batch_size, num_ranks=num_ranks)
    ranges = list(chunks.ranges())
    rows = batch_size * num_ranks
    padding = sum(-(stop - first) % rows for first, stop in ranges)
    assert padding == -(NUM_EXAMPLES - start) % rows, "only the last batch of the data is padded"
    assert padding < 1e-4 * (NUM_EXAMPLES - start)
    assert len(ranges) == -(-(NUM_EXAMPLES - start) // 2**16)
    assert ranges[0][0] == start and ranges[-1][1] == NUM_EXAMPLES
    assert all(one[1] == other[0] for one, other in zip(ranges, ranges[1:], strict=False))


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 1), (1, 8), (2, 8), (3, 5), (512, 16), (4096, 64)])
def test_every_rank_reads_its_rows_of_every_batch(num_ranks: int, batch_size: int) -> None:
    rows = batch_size * num_ranks
    start, stop = 7, 7 + 5 * rows + rows // 2 + 1
    chunks = ScoringChunks(start=start, num_examples=stop, batch_size=batch_size, num_ranks=num_ranks)
    # At least one batch of all ranks; no rank runs more than 256 batches before losses are written.
    assert rows <= chunks.size <= max(2**16, rows) and chunks.size <= 256 * rows and chunks.size % rows == 0
    ids = torch.stack([torch.stack(list(chunks.ids(rank))) for rank in range(num_ranks)], dim=1)  # [batch, rank, row]
    expected = torch.arange(start, start + ids.numel()).clamp(max=stop - 1)
    assert torch.equal(ids.flatten(), expected) and ids.numel() - (stop - start) < rows


@pytest.mark.parametrize(("num_ranks", "batch_size"), WORLDS)
def test_files_operations_and_bytes_of_a_whole_scoring(tmp_path: Path, num_ranks: int, batch_size: int) -> None:
    """Three chunks are counted; the others are like them."""
    chunks = ScoringChunks(start=0, num_examples=NUM_EXAMPLES, batch_size=batch_size, num_ranks=num_ranks)
    losses = torch.rand(chunks.size)
    with ScoresWriter(tmp_path, scoring=scoring_of(NUM_EXAMPLES)) as writer, counting(tmp_path) as calls:
        for _ in range(3):
            writer.append(losses)
        writer.wait()
    assert calls.num_calls == {name: 3 * number for name, number in CALLS_PER_CHUNK.items()}
    assert calls.max_files <= 3, "losses.bin, scoring.json and the one that replaces it"
    num_chunks = len(list(chunks.ranges()))
    assert num_chunks * calls.num_calls.total() / 3 < 110_000
    assert calls.read == [0, 0] and calls.written[0] == 0, "no file work in the thread that scores"
    # 4 bytes per example and half a kilobyte per chunk.
    assert calls.written[1] / 3 * num_chunks < 1.01 * 4 * num_chunks * chunks.size


def finishing(folder: Path, num_examples: int) -> tuple[FileCalls, FileCalls]:
    """The calls of resuming, and then of finishing, a scoring whose losses are all written."""
    with ScoresWriter(folder, scoring=scoring_of(num_examples)) as writer:
        writer.append(torch.rand(num_examples))
        writer.wait()
    with counting(folder) as start:
        writer = ScoresWriter(folder, scoring=scoring_of(num_examples)).__enter__()
        writer.wait()
    with counting(folder) as end:
        writer.finish()
    writer.__exit__()
    StoredScores(folder).verify_checksum()
    return start, end


def test_the_calls_of_resuming_and_finishing_do_not_depend_on_the_number_of_losses(tmp_path: Path) -> None:
    small, large = 1_000, 5_000_000  # the large one is hashed in 3 blocks
    (small_start, small_end), (start, end) = (finishing(tmp_path / str(n), n) for n in (small, large))
    assert end.num_calls == small_end.num_calls == {"open": 2, "fsync": 2, "replace": 1, "unlink": 1}
    assert end.read == [0, 0] and end.written[1] == 0 and end.written[0] < 1000
    assert start.num_calls == small_start.num_calls and start.num_calls.total() < 20
    # The prefix is read once, in another thread than the one on which ranks wait for the number of losses.
    assert start.read[1] == large * 4 and start.read[0] < 2000 and sum(start.written) < 1000


def test_finding_the_number_of_losses_reads_one_small_file(tmp_path: Path) -> None:
    """Every rank does this."""
    with ScoresWriter(tmp_path, scoring=scoring_of(10**6)) as writer:
        writer.append(torch.rand(500_000))
    with counting(tmp_path) as calls:
        assert ScoresWriter(tmp_path, scoring=scoring_of(10**6)).num_scored == 500_000
    assert calls.num_calls == {"open": 1} and sum(calls.read) < 1000 and calls.written == [0, 0]
