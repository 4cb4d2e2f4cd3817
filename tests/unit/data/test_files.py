"""files.py: reads from any file of a folder, with few of them open, on many threads at once."""

import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from titan_attent.data.io.files import OpenFiles, open_file_limit

NUM_FILES, SIZE = 30, 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(NUM_FILES):
        (tmp_path / f"{number}").write_bytes(content(number))
    return tmp_path


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def read(files: OpenFiles, number: int, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    files.read_into(memoryview(buffer), name=str(number), offset=start)
    return bytes(buffer)


def open_descriptors(folder: Path) -> int:
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).startswith(str(folder)) for link in links)


def test_reads_are_exact_and_few_files_are_open(folder: Path) -> None:
    files, generator = OpenFiles(folder, limit=3), np.random.default_rng(0)
    for _ in range(300):
        number, (start, stop) = int(generator.integers(NUM_FILES)), sorted(generator.integers(0, SIZE + 1, 2).tolist())
        assert read(files, number, start, stop) == content(number)[start:stop]
        assert open_descriptors(folder) == len(files) <= 3
    del files
    assert open_descriptors(folder) == 0


def test_the_least_recently_used_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, stock = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(Path(path).name) or stock(path, *args))
    files = OpenFiles(folder, limit=2)
    for number in (1, 2, 1, 3, 1, 2):
        read(files, number, 0, 10)
    assert opened == ["1", "2", "3", "2"]


def test_a_file_is_not_closed_under_a_reader_in_another_thread(folder: Path) -> None:
    files = OpenFiles(folder, limit=1)  # nearly every read closes the file of another one

    def one(seed: int) -> bool:
        generator = np.random.default_rng(seed)
        number, start = int(generator.integers(NUM_FILES)), int(generator.integers(SIZE - 100))
        return read(files, number, start, start + 100) == content(number)[start : start + 100]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(2000)))
    assert open_descriptors(folder) == 1


def test_a_file_that_ends_too_early_or_is_gone_is_named(folder: Path) -> None:
    files = OpenFiles(folder)
    with pytest.raises(ValueError, match=r"/7: ends at byte 1000, before byte 1010 .* truncated or replaced"):
        read(files, 7, 990, 1010)
    (folder / "8").unlink()
    with pytest.raises(FileNotFoundError, match="/8"):
        read(files, 8, 0, 10)
    (folder / "9").unlink()
    (folder / "9").mkdir()
    with pytest.raises(OSError, match="/9"):
        read(files, 9, 0, 10)


def test_a_copy_opens_its_own(folder: Path) -> None:
    files = OpenFiles(folder, limit=5)
    read(files, 1, 0, 10)
    copy = pickle.loads(pickle.dumps(files))
    assert (copy.limit, len(copy), len(files)) == (5, 0, 1)
    assert read(copy, 2, 5, 15) == content(2)[5:15]


@pytest.mark.parametrize(
    ("may", "keeps"), [(20, 16), (64, 16), (1024, 256), (10**6, 16_384), (resource.RLIM_INFINITY, 16_384)]
)
def test_a_quarter_of_what_the_process_may_open(monkeypatch: pytest.MonkeyPatch, may: int, keeps: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda of: (may, resource.RLIM_INFINITY))
    assert open_file_limit() == keeps == OpenFiles(Path()).limit


SHARDS = 1100
MANY = f"""
import sys, numpy as np, torch
from pathlib import Path
from titan_attent.data.text.format import ShardWriter, write_index
from titan_attent.data.text.shards import TokenDataset
folder, dtype = Path(sys.argv[1]), np.dtype("<u2")
stream = np.random.default_rng(0).integers(0, 500, {SHARDS} * 20).astype(dtype)
entries = []
for number, part in enumerate(np.split(stream, {SHARDS})):
    with ShardWriter(folder / f"shard-{{number:05d}}.bin", dtype=dtype) as shard:
        shard.append(part)
        entries.append(shard.finish())
info = dict(name="none", vocab_size=500, eos_id=499)
write_index(folder, dtype=dtype, shards=entries, num_documents=1, max_token_id=499, tokenizer=info)
dataset = TokenDataset(folder, seq_len=7)
ids = torch.randperm(len(dataset))
inputs, labels = dataset.batch(ids)
places = ids[:, None] * 7 + torch.arange(8)
expected = torch.from_numpy(stream.astype(np.int64))[places]
assert torch.equal(inputs, expected[:, :-1]) and torch.equal(labels, expected[:, 1:])
print("read", len(ids))
"""


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    command = [sys.executable, "-c", MANY, str(tmp_path)]
    result = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert result.stdout == f"read {(SHARDS * 20 - 1) // 7}\n", result.stderr
