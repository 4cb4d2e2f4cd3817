"""Documents of .csv and .tsv files: what is read, refused, left out and resumed."""

import base64
import codecs
import csv
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text import writer
from titan_attent.data.text.documents import Document, read_documents
from titan_attent.data.text.inputs import InputFile, list_files
from titan_attent.data.text.progress import run_arguments
from titan_attent.data.text.records import Records, make_records
from titan_attent.data.text.sample import sample_texts
from titan_attent.data.text.writer import TextSummary, write_dataset

TEXTS = ["one\ntwo", "漢字 “q”", "", 'say ""hi"", he said "', "a,b\tc;d", "cr\r\nlf", " last "]
HEADER = ["id", "text", "more"]
Rows = Sequence[Sequence[str]]


def table(rows: Rows, *, delimiter: str = ",", line_end: str = "\n", header: Sequence[str] = HEADER) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=line_end).writerows([header, *rows])
    return out.getvalue().encode()


def rows_of(texts: Sequence[str]) -> list[list[str]]:
    return [[str(i), text, f"meta {i}"] for i, text in enumerate(texts)]


def files_of(*inputs: Path, **options) -> list[InputFile]:
    return list_files(parse_inputs(list(inputs)), **options)


def texts_of(
    *inputs: Path, skip: bool = False, records: Records | None = None, max_bytes: int = 2**20, **options
) -> list[str | None]:
    files = files_of(*inputs, skip=skip, **options)
    records = records or make_records()
    return [one.text for one in read_documents(files, records=records, skip=skip, max_bytes=max_bytes)]


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    if path.name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def continues_after_each(files: Sequence[InputFile], documents: Sequence[Document]) -> None:
    for i, document in enumerate(documents):
        rest = list(read_documents(files, records=make_records(), skip=True, start=document.cursor))
        assert [(d.text, d.cursor) for d in rest] == [(d.text, d.cursor) for d in documents[i + 1 :]]


# What is read.


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.CSV", "a.csv.gz", "a.tsv.gz", "a.csv.zst"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_record_is_a_document(tmp_path: Path, name: str, line_end: str, mark: bytes) -> None:
    content = mark + table(rows_of(TEXTS), delimiter="\t" if "tsv" in name else ",", line_end=line_end)
    path = put(tmp_path / "in" / name, content)
    assert texts_of(path) == texts_of(tmp_path / "in") == TEXTS
    files = files_of(path, path)
    documents = list(read_documents(files, records=make_records()))
    assert [one.text for one in documents] == [*TEXTS, *TEXTS]
    continues_after_each(files, documents)
    if not name.endswith(("gz", "zst")):
        assert sum(one.num_bytes for one in documents) == 2 * path.stat().st_size


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1), max_size=8))
def test_what_another_reader_of_tables_reads(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = put(tmp_path_factory.mktemp("csv") / "a.csv", table(rows_of(texts)))
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    convert = pyarrow.csv.ConvertOptions(column_types={"text": pyarrow.string()}, strings_can_be_null=False)
    expected = pyarrow.csv.read_csv(path, parse_options=options, convert_options=convert)["text"].to_pylist()
    assert texts_of(path) == expected == texts


def test_empty_lines_and_files(tmp_path: Path) -> None:
    assert texts_of(put(tmp_path / "a.csv", b"\n\r\ntext,id\n\na,1\n\n\nb,2")) == ["a", "b"]
    assert texts_of(put(tmp_path / "b.csv", b""), put(tmp_path / "c.csv", b"id,text\n")) == []
    assert texts_of(put(tmp_path / "d.csv", b'text\nx\n""\n\ny\n')) == ["x", "", "y"]  # of one column


def test_a_field_longer_than_the_default_limit_of_the_csv_module(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert texts_of(put(tmp_path / "a.csv", table(rows_of([long, "y"])))) == [long, "y"]


def test_other_columns(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", table([["p", "c", "x"], ["q", " ", "x"]], delimiter="\t", header=["in", "out", "z"]))
    assert texts_of(path, records=make_records(text_key="z")) == ["x", "x"]
    pairs = make_records(prompt_key="in", completion_key="out")
    documents = list(read_documents(files_of(path), records=pairs, skip=True))
    assert [one.text for one in documents] == ["pc", None]
    assert [(segment.text, segment.counts) for segment in documents[0].segments] == [("p", False), ("c", True)]
    with pytest.raises(ValueError, match="'out' is str, not a list of messages"):
        texts_of(path, records=make_records(messages_key="out"))


# What is refused and left out.


@pytest.mark.parametrize(
    ("content", "words", "left"),
    [
        (b"id,content\n1,x\n", ["a.csv: no column 'text'", "--text-key, one of 'id', 'content'"], [None]),
        (b"id;text\n1;x\n", ["a.csv: no column 'text'", "one of 'id;text'"], [None]),
        (b"text,text\na,b\n", ["a.csv: the column 'text' appears twice"], [None]),
        (b"t\xffxt,text\na,b\n", ["a.csv:1: the record is not UTF-8", "convert the file to UTF-8"], [None]),
        (b'id,text\n1,"a\nb"\n2,x,y\n3,z\n', ["a.csv:4: 3 fields where the header has 2"], ["a\nb", None, "z"]),
        (b"id,text\n1,a\n2\n3,z\n", ["a.csv:3: 1 fields where the header has 2"], ["a", None, "z"]),
        (b'id,text\n1,a\n2,"\xff\nx"\n3,z\n', ["a.csv:3: the record is not UTF-8"], ["a", None, "z"]),
        (b'id,text\n1,a\n2,"x\n3,z\n', ["a.csv:3: wrong quotes", "unexpected end of data"], ["a", None]),
        (b'id,text\n1,a\n2,"x" y\n3,z\n', ["a.csv:3: wrong quotes", "not read beyond", "twice"], ["a", None]),
        (b"id,text\r1,a\r", ["a.csv:1: wrong quotes or line ends"], [None]),
        ("id,text\n1,a\n".encode("utf-16-le"), ["a.csv: no column 'text'"], [None]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_cannot_be_used(
    tmp_path: Path, content: bytes, words: list[str], left: list[str | None], packed: bool
) -> None:
    path = put(tmp_path / ("a.csv.gz" if packed else "a.csv"), content)
    after = put(tmp_path / "b.csv", b"text\nnext\n")
    with pytest.raises(ValueError) as caught:
        texts_of(path)
    for word in [*words, "--on-bad skip"]:
        assert word.replace("a.csv", path.name) in str(caught.value)
    assert texts_of(path, after, skip=True) == [*left, "next"]
    files = files_of(path, after)
    continues_after_each(files, list(read_documents(files, records=make_records(), skip=True)))


def test_utf_16_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "id,text\n1,a\n".encode("utf-16"))
    with pytest.raises(ValueError, match="a.csv: UTF-16 or UTF-32, by its byte-order mark, but records must be UTF-8"):
        texts_of(path)


def test_a_quote_within_a_field_without_quotes_is_text(tmp_path: Path) -> None:
    assert texts_of(put(tmp_path / "a.csv", b'text,id\n5" pipe,1\nx"y",2\n')) == ['5" pipe', 'x"y"']


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.zst"])
def test_a_record_of_any_size_is_never_held(tmp_path: Path, name: str) -> None:
    fits = b"x" * (1000 - len(b"1,\n"))
    path = put(tmp_path / name, b'id,text\n1,%s\n2,"%s\n' % (fits, b"line\n" * 4_000_000))
    tracemalloc.start()
    try:
        texts = texts_of(path, skip=True, max_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert texts == [fits.decode(), None]
    with pytest.raises(ValueError, match=r"a.csv[.gzst]*:3: the record takes more than 1,000 bytes; .* raise --max"):
        texts_of(path, max_bytes=1000)
    with pytest.raises(ValueError, match=r"a.csv[.gzst]*:2: the record takes more than 999 bytes"):
        texts_of(path, max_bytes=999)


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    generator = random.Random(0)
    content = gzip.compress(table(rows_of([str(generator.random()) for _ in range(3000)])))
    path = tmp_path / "a.csv.gz"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"damaged gzip file after line \d+"):
        texts_of(path)


# Folders.


def test_tables_of_a_folder_are_read_where_nothing_else_is(tmp_path: Path) -> None:
    put(tmp_path / "b.tsv", "text\tid\ny\t1\n")
    put(tmp_path / "a.csv", "text,id\nx,1\n")
    put(tmp_path / "README.md", "about")
    assert texts_of(tmp_path) == ["x", "y"]
    for name, content, expected in (("c.jsonl", '{"text": "z"}', "z"), ("c.txt", "plain " * 99, "plain " * 99)):
        path = put(tmp_path / name, content)
        left_out = LeftOut()
        assert expected in texts_of(tmp_path, left_out=left_out, skip=True)
        assert len(texts_of(tmp_path, skip=True)) == (1 if "jsonl" in name else 2)  # c.txt is read with the README
        assert sum(left_out.counts.values()) == (3 if "jsonl" in name else 2)
        path.unlink()
    put(tmp_path / "c.jsonl", '{"text": "z"}')
    assert texts_of(tmp_path, extensions=["csv", "jsonl"]) == ["x", "z"]


# A tokenizer's sample, and the writer.


def test_texts_are_sampled(tmp_path: Path) -> None:
    texts = [f"text {i} " * 40 for i in range(200)]
    path = put(tmp_path / "a.csv", table(rows_of(texts)))
    options = {"records": make_records(), "max_bytes": 2**20}
    assert "".join(sample_texts(files_of(path), num_bytes=2**20, **options)) == "".join(texts)  # type: ignore[arg-type]
    assert sum(map(len, sample_texts(files_of(path), num_bytes=5000, **options))) == 5000  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    return str(path)


def written(folder: Path) -> list[str]:
    index = json.loads((folder / "index.json").read_text())
    tokens = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in index["shards"]]).tolist()
    ends = [i for i, token in enumerate(tokens) if token == 256]
    return [bytes(tokens[first + 1 : last]).decode() for first, last in zip([-1, *ends], ends, strict=False)]


def write(path: Path, output: Path, ranks: str, **options) -> TextSummary:
    return write_dataset([path], output=output, tokenizer=ranks, shard_tokens=60, num_threads=1, **options)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.zst"])
@pytest.mark.parametrize("fix", ["correct", "skip"])
def test_a_stopped_writer_resumes_after_its_finished_shards(
    tmp_path: Path, ranks: str, monkeypatch: pytest.MonkeyPatch, name: str, fix: str
) -> None:
    monkeypatch.setattr("titan_attent.data.text.encode.CHUNK_CHARACTERS", 1)
    rows = rows_of([f"document\n{i}" for i in range(60)])
    path = put(tmp_path / name, table([*rows[:40], ["40"], *rows[41:]]))
    with pytest.raises(ValueError, match=r":82: 1 fields where the header has 3; fix or remove the record"):
        write(path, tmp_path / "out", ranks)
    shards = {shard: shard.stat().st_mtime_ns for shard in (tmp_path / "out").glob("shard-*.bin")}
    assert len(shards) > 5
    if fix == "correct":
        put(path, table(rows))
    opened: list[int] = []
    monkeypatch.setattr(
        writer,
        "read_documents",
        lambda files, start, **options: [opened.append(start.offset)] and read_documents(files, start=start, **options),
    )
    summary = write(path, tmp_path / "out", ranks, **({"on_bad": "skip"} if fix == "skip" else {}))
    assert opened[0] > 0
    assert {shard: shard.stat().st_mtime_ns for shard in shards} == shards
    expected = [row[1] for row in rows if fix == "correct" or row[0] != "40"]
    assert written(tmp_path / "out") == expected
    assert summary.skipped == ({"malformed": 1} if fix == "skip" else {})


def test_a_run_of_an_earlier_version_that_read_tables_as_texts_is_not_mixed(tmp_path: Path) -> None:
    files = files_of(put(tmp_path / "a.csv", "text\nx\n"))
    before = [file._replace(kind="text") for file in files]
    assert run_arguments(files, tokenizer="x") != run_arguments(before, tokenizer="x")
