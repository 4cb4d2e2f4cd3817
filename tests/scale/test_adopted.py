"""Opening an adopted data set of many files and 10^10 documents: counts of stats and opens, and memory.

All are proportional to the files: ADOPTED_FILES=100000 asks for as many, in half a minute.
"""

import os
import resource
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

import titan_attent.data.text.format as text_format
from titan_attent.data.io.files import OpenFiles
from titan_attent.data.text.file_view import FileView
from titan_attent.data.text.format import ShardEntry, write_index
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.spans import count_all_examples

NUM_FILES, LENGTH, RANKS = int(os.environ.get("ADOPTED_FILES", "5000")), 1000, 512
FILE_DOCUMENTS = 10**10 // NUM_FILES
FILE_BYTES, MTIME = 2 * FILE_DOCUMENTS * LENGTH, 1_700_000_000_123_456_789
INFO = {"name": "none", "vocab_size": 500, "eos_id": 499}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index and a histogram of lengths: there are no files, so any access to one would fail."""
    folder = tmp_path_factory.mktemp("adopted")
    entries = [
        ShardEntry(
            f"adopted-{number:05d}.bin",
            FILE_DOCUMENTS * LENGTH,
            "0" * 64,
            num_documents=FILE_DOCUMENTS,
            documents_sha256="1" * 64,
            view=FileView(f"part-{number // 100:04d}/{number:06d}.ds", 0, FILE_BYTES, 0, FILE_BYTES, MTIME),
        )
        for number in range(NUM_FILES)
    ]
    lengths = np.array([LENGTH]), np.array([NUM_FILES * FILE_DOCUMENTS])
    with mock.patch.object(text_format, "count_lengths", lambda folder, shards: lengths):
        write_index(
            folder,
            dtype=np.dtype("<u2"),
            shards=entries,
            num_documents=NUM_FILES * FILE_DOCUMENTS,
            max_token_id=499,
            tokenizer=INFO,
            root="/files",
            options="",
        )
    return folder


class Opened(NamedTuple):
    shards: TokenShards
    grown_bytes: int


@pytest.fixture(scope="module")
def opened(folder: Path) -> Opened:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with mock.patch.object(OpenFiles, "read_into", side_effect=AssertionError("reads a file")):
        shards = TokenShards(folder, check_sizes=False)
    return Opened(shards, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_opening_is_bounded(opened: Opened) -> None:
    """One read of the index; a few kilobytes per file, most of them the JSON while it is parsed; no file is touched."""
    assert opened.grown_bytes < 5000 * NUM_FILES
    with mock.patch.object(OpenFiles, "read_into", side_effect=AssertionError("reads a file")):
        assert count_all_examples(opened.shards, seq_len=256) == 4 * NUM_FILES * FILE_DOCUMENTS
        dataset = TokenDataset(opened.shards, seq_len=2048)
        last = dataset.location(len(dataset) - 1)
    assert last["shard"] == f"part-{(NUM_FILES - 1) // 100:04d}/{NUM_FILES - 1:06d}.ds"
    assert last["first_token"] < FILE_DOCUMENTS * LENGTH


def test_all_ranks_together_stat_every_file_once(opened: Opened) -> None:
    stats, stock = Counter[str](), os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
        name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not name.startswith("/files/") and not name.endswith(".documents"):
            return stock(path, *args, **kwargs)
        stats[name] += 1
        is_sidecar = name.endswith(".documents")
        return SimpleNamespace(st_size=4 * FILE_DOCUMENTS if is_sidecar else FILE_BYTES, st_mtime_ns=MTIME)

    with mock.patch("os.stat", stat):
        for rank in range(RANKS):
            before = stats.total()
            opened.shards.check_sizes(range(rank or RANKS, NUM_FILES, RANKS))  # rank 0 without lengths.bin: shard 0
            assert stats.total() - before <= 2 * -(-NUM_FILES // RANKS)
    assert len(stats) == 2 * (NUM_FILES - 1) and set(stats.values()) == {1}


def test_an_example_reads_one_file(opened: Opened) -> None:
    reads: list[tuple[str, str, int, int]] = []

    def read_into(self: OpenFiles, buffer: memoryview, *, name: str, offset: int) -> None:
        reads.append((str(self.folder), name, offset, len(buffer)))

    number, token = NUM_FILES // 2 + 10, 45_678_900
    example = (number * FILE_DOCUMENTS * LENGTH + token) // 100
    with mock.patch.object(OpenFiles, "read_into", read_into):
        TokenDataset(opened.shards, seq_len=100).read(torch.tensor([example]))
    assert reads == [("/files", f"part-{number // 100:04d}/{number:06d}.ds", 2 * token, 202)]
