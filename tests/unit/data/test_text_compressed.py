"""Compressed inputs of every kind give what their content gives, and a damaged one is named."""

import gzip
import json
import struct
from pathlib import Path

import pyarrow
import pytest

from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.text.documents import START, read_documents
from titan_attent.data.text.inputs import list_files
from titan_attent.data.text.records import TEXT_RECORDS

TEXTS = [f"text {i} " * (i % 7) for i in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
SKIPPABLE = struct.pack("<II", 0x184D2A50, 3) + b"abc"
CONTENTS = {"a.jsonl": LINES, "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(), "a.txt": LINES}


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


PACKED = {
    "gz": gzip.compress,
    "zst": zstd,
    # As pzstd and the seekable format write it.
    "frames.zst": lambda content: zstd(content[:5000]) + SKIPPABLE + zstd(content[5000:]) + SKIPPABLE,
}


def documents(path: Path, **options):
    return list(read_documents(list_files(parse_inputs([path])), records=TEXT_RECORDS, **options))


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("packing", PACKED)
def test_the_documents_are_those_of_the_content(tmp_path: Path, name: str, packing: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    plain = [document.text for document in documents(tmp_path / name)]
    (tmp_path / name).unlink()
    path = tmp_path / f"{name}.{packing.rpartition('.')[2].upper()}"
    path.write_bytes(PACKED[packing](CONTENTS[name]))
    assert [document.text for document in documents(path)] == plain
    assert [document.text for document in documents(tmp_path)] == plain, "found in its folder"
    assert len(plain) == (1 if name == "a.txt" else len(TEXTS))


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_reading_continues_after_any_document(tmp_path: Path, name: str, packing: str) -> None:
    path = tmp_path / f"{name}.{packing.rpartition('.')[2]}"
    path.write_bytes(PACKED[packing](CONTENTS[name]))
    whole = documents(path)
    for number in (0, 1, 1234, len(whole) - 1):
        rest = documents(path, start=whole[number].cursor)
        assert [document.text for document in rest] == TEXTS[number + 1 :]
    assert [document.text for document in documents(path, start=START)] == TEXTS


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("damage", ["cut", "extended", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path, packed = tmp_path / f"{name}.zst", zstd(CONTENTS[name])
    path.write_bytes({"cut": packed[:-5], "extended": packed + b"garbage", "other": b"no"}[damage])
    with pytest.raises(ValueError, match=rf"{name}.zst: damaged zst file.*compress it again.*--on-bad skip"):
        documents(path)
    assert documents(path, skip=True)[-1].bad is not None, "what came before the damage is kept"


def test_a_large_document_is_not_inflated_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd(b"a" * 10**6))
    with pytest.raises(ValueError, match="has more than 1,000 bytes"):
        documents(path, max_bytes=1000)
