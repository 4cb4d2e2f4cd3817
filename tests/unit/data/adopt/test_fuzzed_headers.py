"""10,000 damaged headers: each is accepted or refused with one ValueError, at once, in memory of the files' size.

What is accepted fits its files: all ends and segments are those of tokens that are there.
"""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import token_files
from token_files import adopted, make_documents

from titan_attent.data.formats.table import FORMATS
from titan_attent.data.formats.token_file import TOKEN_DTYPES, Hints
from titan_attent.data.text.shards import TokenShards

NUM_HEADERS = 10_000
TRACED = 5
"""The allocations of every fifth header are traced."""
MAX_BYTES = 2**20
"""Allocated at most while a header is read; the files have a few thousand bytes."""
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)

DOCUMENTS = make_documents(count=30)


def write_megatron(folder: Path) -> None:
    token_files.megatron(folder / "a", DOCUMENTS)


def write_llmc(folder: Path) -> None:
    token_files.llmc(folder / "a.bin", DOCUMENTS)


def write_numpy(folder: Path) -> None:
    np.save(folder / "a.npy", np.concatenate(DOCUMENTS).astype("<u2"))


def write_dolma(folder: Path) -> None:
    token_files.raw(folder / "a.npy", DOCUMENTS, lines=True)


def write_datatrove(folder: Path) -> None:
    token_files.datatrove(folder / "a.ds", DOCUMENTS, mask=np.ones(sum(map(len, DOCUMENTS)), dtype=bool))


def write_mds(folder: Path) -> None:
    token_files.mds(folder, [DOCUMENTS[:10], DOCUMENTS[10:]], encoding="ndarray", beside={"a": "str"})


def write_litdata(folder: Path) -> None:
    token_files.litdata(folder, [DOCUMENTS[:10], DOCUMENTS[10:]])


CASES: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "megatron": (write_megatron, "a.idx", ("a.idx", "a.bin")),
    "llm.c": (write_llmc, "a.bin", ("a.bin",)),
    "numpy": (write_numpy, "a.npy", ("a.npy",)),
    "raw": (write_dolma, "a.npy", ("a.csv.gz", "a.npy")),
    "datatrove": (write_datatrove, "a.ds", ("a.ds.index", "a.ds", "a.ds.loss")),
    "mds": (write_mds, "index.json", ("index.json", "shard.00000.mds", "shard.00001.mds")),
    "litdata": (write_litdata, "index.json", ("index.json", "chunk-0-0.bin")),
}
"""Format -> (writer, entry, files to damage)."""


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """``content`` with one to three damages, most of them in its first bytes."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        at = int(len(data) * generator.random() ** 4)
        kind = generator.integers(0, 6)
        if kind == 0 and data:
            data[at] = generator.integers(0, 256)
        elif kind == 1 and data:
            data[at] ^= 1 << int(generator.integers(0, 8))
        elif kind == 2:
            number = NUMBERS[generator.integers(0, len(NUMBERS))]
            size = int(generator.choice([1, 2, 4, 8]))
            data[at : at + size] = struct.pack("<Q", number)[:size]
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data += bytes(int(generator.integers(1, 20)))
        else:
            data[at : at + 8] = str(NUMBERS[generator.integers(0, len(NUMBERS))]).encode()
    return bytes(data)


def damaged_json(content: bytes, generator: np.random.Generator) -> bytes:
    """A JSON text in which some values are others, or the text itself is damaged."""
    if generator.random() < 0.3:
        return damaged(content, generator)
    value = json.loads(content)
    for _ in range(generator.integers(1, 3)):
        parent, key, target = None, None, value
        while isinstance(target, (dict, list)) and target and (parent is None or generator.random() < 0.9):
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            parent, key = target, keys[generator.integers(0, len(keys))]
            target = parent[key]
        assert parent is not None
        choices = [None, True, -1, 0, 0.5, [], {}, "", "../x", "pkl", "ndarray:int64", *NUMBERS]
        parent[key] = choices[generator.integers(0, len(choices))]
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", CASES)
def test_no_damage_crashes_hangs_or_allocates(name: str, tmp_path: Path) -> None:
    write, entry, targets = CASES[name]
    write(tmp_path)
    contents = {target: (tmp_path / target).read_bytes() for target in targets}
    generator, hints = np.random.default_rng(sorted(CASES).index(name)), Hints(dtype=TOKEN_DTYPES["uint16"])
    assert read_all(name, tmp_path / entry, hints)  # imports what is imported at its first use
    num_accepted = 0
    try:
        for number in range(-(-NUM_HEADERS // len(CASES))):
            target = targets[0] if generator.random() < 0.6 else targets[generator.integers(0, len(targets))]
            change = damaged_json if target.endswith(".json") else damaged
            (tmp_path / target).write_bytes(change(contents[target], generator))
            if number % TRACED == 0:  # it takes several times as long
                tracemalloc.start()
            try:
                num_accepted += read_all(name, tmp_path / entry, hints)
            except ValueError as error:
                assert str(tmp_path) in str(error) and len(str(error)) < 1000
            assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
            tracemalloc.stop()
            (tmp_path / target).write_bytes(contents[target])
    finally:
        tracemalloc.stop()
    assert num_accepted > 10  # damages of tokens, of what is not read, and none


def read_all(name: str, path: Path, hints: Hints) -> bool:
    """Read what the format says, and check that it fits; whether it is accepted."""
    form = FORMATS[name]
    if not form.is_entry(path):
        return False
    for file in form.open_files(path, hints):
        num_bytes = os.stat(file.path).st_size
        assert 0 < file.num_tokens * file.dtype.itemsize <= num_bytes - file.offset
        if file.ends is not None:
            ends = np.concatenate(list(file.ends()))
            assert ends[-1] == file.num_tokens and np.all(np.diff(ends, prepend=0) >= 0)
        if file.segments is not None:
            offsets, lengths = (np.concatenate(column) for column in zip(*file.segments(), strict=True))
            assert lengths.sum() == file.num_tokens and lengths.min() > 0
            assert offsets.min() >= 0 and (offsets + lengths * file.dtype.itemsize).max() <= num_bytes
    return True


@pytest.mark.parametrize("name", CASES)
def test_what_is_adopted_of_damaged_files_can_be_read(name: str, tokenizer: Path, tmp_path: Path) -> None:
    write, _, targets = CASES[name]
    files = tmp_path / "files"
    files.mkdir()
    write(files)
    contents = {target: (files / target).read_bytes() for target in targets}
    generator = np.random.default_rng(7 + sorted(CASES).index(name))
    num_adopted = 0
    for number in range(40):
        target = targets[generator.integers(0, len(targets))]
        change = damaged_json if target.endswith(".json") else damaged
        (files / target).write_bytes(change(contents[target], generator))
        index = tmp_path / f"index-{number}"
        try:
            adopted(
                files,
                tokenizer,
                output=index,
                dtype="uint16",
                format=name,
                bos="900",
                boundaries="index" if number % 2 else "",
            )
        except ValueError:
            assert not (index / "index.json").exists()
        else:
            shards, num_adopted = TokenShards(index), num_adopted + 1
            assert len(shards.read(0, shards.num_tokens)) == shards.num_tokens
            shards.verify_checksums()
        (files / target).write_bytes(contents[target])
    assert num_adopted or name in ("llm.c", "numpy")
