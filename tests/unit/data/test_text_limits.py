"""The declared sizes of an input bound memory and time before it is decompressed: small sizes, lowered limits."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.text import encode, parquet_text
from titan_attent.data.text.documents import START, Document, read_documents
from titan_attent.data.text.inputs import list_files
from titan_attent.data.text.parquet_text import _dictionary_bytes
from titan_attent.data.text.records import TEXT_RECORDS
from titan_attent.data.text.tokenizer import Tokenizer

LIMIT = 1000


def read(path: Path, *, skip: bool = False, max_bytes: int = LIMIT) -> list[str | None]:
    files = list_files(parse_inputs([path]))
    return [document.text for document in read_documents(files, records=TEXT_RECORDS, skip=skip, max_bytes=max_bytes)]


def record(size: int) -> bytes:
    return json.dumps({"text": "x" * size}).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson.gz"])
def test_a_line_of_any_length_is_never_held(tmp_path, name):
    content = record(5) + record(20_000_000) + record(7) + record(LIMIT - 13) + record(LIMIT - 12)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    with pytest.raises(
        ValueError, match=f"{name}:2: this line has more than 1,000 bytes; .* raise --max-document-bytes"
    ):
        read(path)
    tracemalloc.start()
    try:
        texts = read(path, skip=True)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    # `{"text": ""}` and a line's end are 13 bytes.
    assert texts == ["x" * 5, None, "x" * 7, "x" * (LIMIT - 13), None]
    files = list_files(parse_inputs([path]))
    documents = list(read_documents(files, records=TEXT_RECORDS, skip=True, max_bytes=LIMIT))
    behind = read_documents(files, records=TEXT_RECORDS, start=documents[1].cursor, skip=True, max_bytes=LIMIT)
    assert [document.text for document in behind] == texts[2:]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.json", "a.json.gz"])
def test_a_text_and_an_element_of_an_array_have_the_limit(tmp_path, name):
    for size, fits in ((900, True), (2_000_000, False)):
        content = b"[" + record(5).strip() + b", " + record(size) + b"]" if "json" in name else b"x" * size
        path = tmp_path / name
        path.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
        if fits:
            assert read(path)[-1] == "x" * size
        else:
            with pytest.raises(ValueError, match=r"more than 1,000 bytes; .*raise --max-document-bytes"):
                read(path)
            assert read(path, skip=True) == ["x" * 5, None][-1 if "txt" in name else 0 :]
            assert read(path, max_bytes=3_000_000)[-1] == "x" * size


def table(path: Path, texts: list[str], *, dictionary: bool, **options) -> Path:
    array = pyarrow.array(texts)
    pyarrow.parquet.write_table(
        pyarrow.table({"n": list(range(len(texts))), "text": array}), path, use_dictionary=dictionary, **options
    )
    return path


@pytest.mark.parametrize("dictionary", [False, True])
def test_rows_are_read_by_bytes(tmp_path, monkeypatch, dictionary):
    """With 500 rows of 10,000 characters, also of one text, no more rows are in memory than the bound allows."""
    monkeypatch.setattr(parquet_text, "READ_BYTES", 100_000)
    sizes: list[int] = []
    values = parquet_text._values

    def counted(array: pyarrow.Array) -> list[object]:
        sizes.append(len(array))
        return values(array)

    monkeypatch.setattr(parquet_text, "_values", counted)
    path = table(tmp_path / "a.parquet", ["x" * 10_000] * 500, dictionary=dictionary, compression="zstd")
    assert path.stat().st_size < 20_000
    assert read(path, max_bytes=20_000) == ["x" * 10_000] * 500
    assert sum(sizes) == 500
    assert max(sizes) <= 10
    short = table(tmp_path / "b.parquet", [f"{i}" for i in range(5000)], dictionary=dictionary)
    sizes.clear()
    monkeypatch.setattr(parquet_text, "READ_BYTES", 2**26)
    assert read(short) == [f"{i}" for i in range(5000)]
    assert len(sizes) < 30 + 10 * dictionary  # and many at a time where they are short


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_table_that_declares_too_much_is_refused_before_it_is_decompressed(tmp_path, monkeypatch, dictionary):
    path = table(tmp_path / "a.parquet", ["x" * 5000] * 4, dictionary=dictionary, compression="zstd")
    monkeypatch.setattr(parquet_text, "READ_BYTES", 1000)
    monkeypatch.setattr(parquet_text, "_values", lambda array: pytest.fail("was read"))
    # For texts that are stored once, the dictionary has the size; for others, the bytes per row.
    with pytest.raises(
        ValueError, match=r"a.parquet: after row 0 the file declares .* bytes, more than 1,000; .*--max-doc"
    ):
        read(path)
    assert read(path, skip=True) == [None]


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_long_text_among_short_ones_has_the_limit(tmp_path, dictionary):
    path = table(tmp_path / "a.parquet", ["short", "é" * 501, "é" * 500, *["short"] * 20], dictionary=dictionary)
    with pytest.raises(
        ValueError, match="row 2: more than 1,000 bytes of text; split it, or raise --max-document-bytes"
    ):
        read(path)
    assert read(path, skip=True)[:4] == ["short", None, "é" * 500, "short"]


@pytest.mark.parametrize("size", [1, 63, 64, 8191, 8192, 300_000])
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_the_size_of_a_dictionary_is_that_of_its_page(tmp_path, size, compression):
    path = table(tmp_path / "a.parquet", ["x" * size] * 3, dictionary=True, compression=compression)
    chunk = pyarrow.parquet.read_metadata(path).row_group(0).column(1)
    assert chunk.has_dictionary_page
    with open(path, "rb") as file:
        assert _dictionary_bytes(file, path.stat().st_size, chunk) == size + 4  # a length of 4 bytes, and the text


def test_what_is_queued_is_bounded_by_its_size(monkeypatch):
    """Long documents wait for those in front of them; short ones go many at a time. The order stays."""
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 10)
    queued, max_queued, taken = 0, 0, count()
    sizes = [3, 100, 100, 1, 1, 1, 70, 90, *[2] * 50, 100, 5]

    def documents() -> Iterator[Document]:
        nonlocal queued, max_queued
        for size in sizes:
            queued += size
            max_queued = max(max_queued, queued)
            yield Document("default", "x" * size, START, next(taken))

    class Bytes(Tokenizer):
        eos_id = 256

        def __init__(self) -> None:
            pass

        def encode_to_array(self, text: str) -> np.ndarray:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    order = []
    for document, tokens, _ in encode.encode_documents(documents(), tokenizer=Bytes(), num_threads=2):
        assert tokens is not None
        queued -= len(tokens) - 1
        order.append(document.num_bytes)
    assert order == list(range(len(sizes)))
    # The bound is 80 characters. One longer document may be queued; the next one and a partial chunk may be read ahead.
    assert max_queued <= 100 + 100 + 2 * 20
