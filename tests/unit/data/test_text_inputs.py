"""The files and records that the writer reads in all formats, and those it leaves out: counted, reported or refused."""

import codecs
import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text import json_values
from titan_attent.data.text.documents import Document, read_documents
from titan_attent.data.text.inputs import list_files
from titan_attent.data.text.json_values import TooLargeError, read_values
from titan_attent.data.text.records import TEXT_RECORDS, make_records

TEXTS = ["one\ntwo", "漢字 “q”", "", "{braces} [too]", "last"]
Records = list[dict[str, object]]
RECORDS: Records = [{"id": i, "text": text, "meta": {"text": "inner"}} for i, text in enumerate(TEXTS)]


def lines(records: Records = RECORDS, **options: object) -> bytes:
    return "".join(json.dumps(record, **options) + "\n" for record in records).encode()  # type: ignore[arg-type]


def texts_of(*inputs: Path | str, skip: bool = False, text_key: str = "text", **options) -> list[str | None]:
    records = make_records(text_key=text_key)
    files = list_files(parse_inputs(list(inputs)), records=records, skip=skip, **options)
    return [document.text for document in read_documents(files, records=records, skip=skip)]


def make(folder: Path, contents: Mapping[str, bytes | str]) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def parquet(records: Records = RECORDS) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


# Records.


SHAPES = {
    "lines": lines(),
    "lines without an end": lines().rstrip(),
    "lines with CRLF": lines().replace(b"\n", b"\r\n"),
    "lines after a byte-order mark": codecs.BOM_UTF8 + lines(),
    "lines between blank ones": b"\n \n" + lines().replace(b"\n", b"\n\n"),
    "array": json.dumps(RECORDS).encode(),
    "array over lines": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "array after a byte-order mark": codecs.BOM_UTF8 + json.dumps(RECORDS).encode(),
    "array with one object per line": b"[\n" + lines().rstrip().replace(b"}\n", b"},\n") + b"\n]\n",
    "objects over lines": lines(indent=1),
    "objects without a break": lines().replace(b"\n", b""),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("shape", "head"), [*((s, 2**16) for s in SHAPES), *((s, 16) for s in SHAPES if s != "objects without a break")]
)
def test_records_in_a_json_file(tmp_path, monkeypatch, shape, head, packed):
    """Given by path or in a folder, plain or compressed, and with records that end after the head of the file."""
    monkeypatch.setattr(json_values, "HEAD", head)
    path = tmp_path / "in" / ("data.json.gz" if packed else "data.json")
    make(tmp_path, {f"in/{path.name}": gzip.compress(SHAPES[shape]) if packed else SHAPES[shape]})
    assert texts_of(path) == TEXTS
    if head > 16:  # in a folder the key must be in the head
        assert texts_of(tmp_path / "in") == TEXTS
    files = list_files(parse_inputs([path, path]))
    documents = list(read_documents(files, records=TEXT_RECORDS))
    for i, document in enumerate(documents):
        rest = read_documents(files, records=TEXT_RECORDS, start=document.cursor)
        assert [(d.text, d.cursor) for d in rest] == [(d.text, d.cursor) for d in documents[i + 1 :]]


@pytest.mark.parametrize("escaped", [False, True])
def test_a_key_of_other_letters_is_found_in_either_spelling(tmp_path, escaped):
    """In front of a text that is larger than the head of the file, and twice in a record."""
    key, large = "текст", "x" * json_values.HEAD
    content = json.dumps([{key: large}, {key: "b"}], ensure_ascii=escaped)
    assert texts_of(make(tmp_path / "list", {"data.json": content}), text_key=key) == [large, "b"]
    twice = json.dumps({key: "a", "KEY": "b"}, ensure_ascii=escaped).replace('"KEY"', json.dumps(key))
    for name, content in {"a.jsonl": twice + "\n", "a.json": f"[{twice}]"}.items():
        make(tmp_path, {name: content})
        refused(lambda path=tmp_path / name: texts_of(path, text_key=key), f"the key {key!r} appears twice")


@pytest.mark.parametrize("name", ["a.ndjson", "a.NDJSON", "a.jsonl", "a.ndjson.gz", "a.jsonl.gz", "a.json.gz"])
def test_records_a_line_by_other_names(tmp_path, name):
    make(tmp_path / "in", {name: gzip.compress(lines()) if name.endswith("gz") else lines()})
    assert texts_of(tmp_path / "in" / name) == TEXTS
    assert texts_of(tmp_path / "in") == TEXTS


def test_one_object_is_one_record(tmp_path):
    make(tmp_path, {"a/0.json": '{"text": "x"}', "a/1.json": '{\n "text": "y"\n}\n', "a/2.json": '[{"text": "z"}]'})
    assert texts_of(tmp_path / "a" / "1.json") == ["y"]
    assert texts_of(tmp_path / "a") == ["x", "y", "z"]
    make(tmp_path, {"b.json": "", "c.json": "[]", "d.json": " [ ] \n"})
    assert [texts_of(tmp_path / f"{name}.json") for name in "bcd"] == [[], [], []]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"content": "x"}\n{"content": "y"}\n', ["a.json:1: no key 'text'", "--text-key, one of 'content'"]),
        ('[{"content": "x"}]', ["a.json: record 1: no key 'text'", "--text-key, one of 'content'"]),
        ('{\n"name": "a package"\n}', ["record 1: no key 'text'", "of 'name'"]),
        ('{"text": {"0": "x", "1": "y"}}', ["'text' is dict, not a string"]),
        ('["x", "y"]', ["record 1: a JSON str where an object with the key 'text'"]),
        ("3", ["record 1: a JSON int"]),
        ('{"text": "x"}\n{"text": \n', ["a.json:2: malformed JSON line"]),
        ('[{"text": "x"}, {"text" "y"}]', ["malformed JSON", "after record 1", "one object per line"]),
        ('[{"text": "x"}, {"text": "y"}', ["the array has no end"]),
        ('[{"text": "x"} {"text": "y"}]', ["'{' where ',' or ']' is expected"]),
        ('[{"text": "x"}] {"text": "y"}', ["unexpected content after the array"]),
        ('[{"text": "x"}, ' + "[" * 100_000, ["malformed JSON (nested too deeply)"]),
        ('[{"text": "x\xff"}]'.encode("latin-1"), ["malformed JSON", "utf-8"]),
        (lines().decode().encode("utf-16"), ["UTF-16", "convert the file to UTF-8"]),
    ],
)
def test_a_json_file_that_holds_no_such_records(tmp_path, content, words):
    make(tmp_path, {"a.json": content})
    refused(lambda: texts_of(tmp_path / "a.json"), str(tmp_path / "a.json"), *words, "--on-bad skip")


def test_a_folder_of_json_of_another_key_is_no_text_full_of_braces(tmp_path):
    make(tmp_path, {"README.md": "about", "a.json": '[{"content": "x"}]', "b.json": '{"content": "y"}'})
    refused(lambda: texts_of(tmp_path), "a.json: record 1: no key 'text'", "of 'content'")
    refused(lambda: texts_of(tmp_path, extensions=["json"]), "a.json: record 1: no key 'text'")
    assert texts_of(tmp_path, text_key="content") == ["x", "y"]


def test_values_that_extend_beyond_a_block(monkeypatch):
    import io

    monkeypatch.setattr(json_values, "HEAD", 7)
    values = [{"a": "x" * size, "é": [size, -1.5e3, None, True]} for size in range(40)]
    for content in (
        json.dumps(values, ensure_ascii=False),
        json.dumps(values, indent=3),
        "\n".join(map(json.dumps, values)),
    ):
        assert list(read_values(io.BytesIO(content.encode()), max_bytes=1000)) == values
    assert list(read_values(io.BytesIO(b"[1, 23456789012, 3]"), max_bytes=1000)) == [1, 23456789012, 3]
    with pytest.raises(TooLargeError):
        list(read_values(io.BytesIO(json.dumps(values).encode()), max_bytes=60))


# Folders.


def test_a_snapshot_of_a_data_set_is_its_records(tmp_path):
    snapshot: dict[str, bytes | str] = {
        "README.md": "# About " + "much " * 5000,
        "LICENSE": "none",
        ".gitattributes": "x",
        "dataset_infos.json": json.dumps({"default": {"text": "a description"}}, indent=1),
        "loader.py": "import datasets\n" * 900,
        "data/_SUCCESS": "",
        "data/test.ndjson": lines(RECORDS[:2]),
        "data/train-00000-of-00001.parquet": parquet(RECORDS[2:]),
    }
    make(tmp_path, snapshot)
    left_out = LeftOut()
    assert texts_of(tmp_path, left_out=left_out) == TEXTS
    assert left_out.counts == {"beside records": 5, "hidden": 1}
    assert "5 beside records (first: " in left_out.summary()
    assert left_out.summary().endswith(f"{tmp_path}: test, train are read together; name one to read it alone")
    (tmp_path / "data/test.ndjson").rename(tmp_path / "data/latest-contest.ndjson")
    left_out = LeftOut()
    texts_of(tmp_path, left_out=left_out)
    assert not left_out.notes


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson", "deep/er/a.json.gz"])
def test_records_with_a_readme_beside_them(tmp_path, name):
    content = parquet() if name.endswith("parquet") else gzip.compress(lines()) if name.endswith("gz") else lines()
    make(tmp_path, {"README.md": "about " * 1000, "readme.txt": "x", name: content})
    assert texts_of(tmp_path) == TEXTS


def test_few_records_among_texts_are_left_out_and_counted(tmp_path):
    texts = {f"{i}.py": f"print({i})\n" * 100 for i in range(4)}
    make(tmp_path, {**texts, "fixture.jsonl": '{"text": "x"}', "package.json": '{"name": "p"}'})
    left_out = LeftOut()
    assert texts_of(tmp_path, left_out=left_out) == [*texts.values(), '{"name": "p"}']
    assert left_out.counts == {"records beside texts": 1}
    assert texts_of(tmp_path, extensions=["jsonl"]) == ["x"]
    assert texts_of(tmp_path, extensions=["jsonl", "py"]) == [*texts.values(), "x"]


def test_more_left_out_than_read_is_refused(tmp_path):
    make(tmp_path, {"a.txt": "a", "b.txt": "b", "1.pdf": "x", "2.pdf": "x", ".hidden/many.pdf": "x"})
    left_out = LeftOut()
    assert texts_of(tmp_path, left_out=left_out) == ["a", "b"]
    assert left_out.counts == {"hidden": 1, "of another extension": 2}
    make(tmp_path, {"3.docx": "x"})
    refused(
        lambda: texts_of(tmp_path),
        f"{tmp_path}: left out 1 hidden (first: {tmp_path}/.hidden), 3 of another extension (first: {tmp_path}/1.pdf; "
        "2 .pdf, 1 .docx)",
        "only 2 files to read",
        "--extensions",
        "--on-bad skip",
    )
    assert texts_of(tmp_path, skip=True) == ["a", "b"]
    assert texts_of(tmp_path, extensions=["txt"]) == ["a", "b"]
    # The same for records: many large files beside one record file are not its metadata.
    make(tmp_path / "r", {"a.jsonl": lines(), **{f"{i}.jpg": "x" * 1000 for i in range(3)}})
    refused(lambda: texts_of(tmp_path / "r"), "3 beside records", "only 1 files to read")


def test_dead_links_and_pipes_are_counted(tmp_path):
    make(tmp_path, {"a.txt": "a"})
    (tmp_path / "b.txt").symlink_to("gone")
    os.mkfifo(tmp_path / "c.txt")
    refused(lambda: texts_of(tmp_path), "1 dead link", "1 not a file")


def test_text_with_several_links_is_read_once(tmp_path):
    make(tmp_path, {"corpus/a/x.txt": "one", "disk/y.txt": "two", "disk/deep/z.txt": "three"})
    (tmp_path / "corpus/b").symlink_to("../disk")
    (tmp_path / "corpus/again").symlink_to("../disk/deep")
    (tmp_path / "corpus/a/up").symlink_to("..")
    (tmp_path / "disk/self").symlink_to(".")
    (tmp_path / "disk/deep/back").symlink_to("../../corpus")
    (tmp_path / "corpus/copy.txt").symlink_to("a/x.txt")
    left_out = LeftOut()
    assert texts_of(tmp_path / "corpus", left_out=left_out) == ["one", "three", "two"]
    assert left_out.counts["linked twice"] >= 4
    (tmp_path / "link").symlink_to("corpus")
    assert texts_of(tmp_path / "link") == ["one", "three", "two"]


# Texts.


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_says_what_the_text_is_and_does_not_stay(tmp_path, encoding):
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    make(tmp_path, {"a.txt": mark + "漢字 x\r\n".encode(encoding)})
    assert texts_of(tmp_path / "a.txt") == ["漢字 x\r\n"]
    assert texts_of(tmp_path) == ["漢字 x\r\n"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0" * 100, ["holds a NUL at character 0", "remove it from the inputs"]),
        (b"text\0binary", ["holds a NUL at character 4"]),
        ("text".encode("utf-16-le"), ["holds a NUL at character 1", "UTF-16 without a byte-order mark", "to UTF-8"]),
        (codecs.BOM_UTF16_LE + b"a", ["not UTF-16", "convert the file to UTF-8"]),
        (codecs.BOM_UTF16_LE + b"a\0\0\0", ["holds a NUL at character 1"]),
        (codecs.BOM_UTF16_LE + b"\x00\xd8a\0", ["not UTF-16"]),
        (codecs.BOM_UTF8 + b"\xff", ["not UTF-8"]),
    ],
)
def test_a_named_file_that_is_no_text_is_refused(tmp_path, content, words):
    make(tmp_path, {"a.txt": content})
    refused(lambda: texts_of(tmp_path / "a.txt"), str(tmp_path / "a.txt"), *words)
    assert texts_of(tmp_path / "a.txt", skip=True) == [None]
    assert texts_of(tmp_path) == [None]  # found in a folder: left out, and counted


def test_compressed_text(tmp_path):
    make(tmp_path, {"a.txt.gz": gzip.compress(b"packed"), "b.md": b"plain"})
    assert texts_of(tmp_path / "a.txt.gz") == ["packed"]
    assert texts_of(tmp_path) == ["packed", "plain"]
    make(tmp_path, {"c.txt.gz": gzip.compress(b"packed" * 1000)[:-20]})
    refused(lambda: texts_of(tmp_path / "c.txt.gz"), "damaged gzip file", "compress it again")


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.tar.gz", "a.zip", "a.parquet.gz", "a.txt.xz"])
def test_other_compressions_must_be_unpacked_first(tmp_path, name):
    make(tmp_path, {name: b"x"})
    refused(lambda: texts_of(tmp_path / name), "unsupported extension", "unpack it first")


# Parquet.


def write_table(path: Path, array: pyarrow.Array | pyarrow.ChunkedArray, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        *([pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []),
    ],
    ids=str,
)
def test_text_of_every_type_of_text(tmp_path, kind):
    array = pyarrow.array(TEXTS * 3, pyarrow.string())
    array = array.cast(pyarrow.binary() if kind == pyarrow.large_binary() else kind).cast(kind)
    for stored in (True, False):
        path = write_table(tmp_path / "a.parquet", array, row_group_size=4, store_schema=stored)
        assert texts_of(path) == TEXTS * 3


def test_text_of_dictionaries(tmp_path):
    array = pyarrow.array(TEXTS * 3).dictionary_encode()
    assert texts_of(write_table(tmp_path / "a.parquet", array, row_group_size=4)) == TEXTS * 3
    array = array.cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()))
    assert texts_of(write_table(tmp_path / "a.parquet", array)) == TEXTS * 3


def test_a_name_that_appears_twice(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.string()), ("text", pyarrow.string())])
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(lambda: texts_of(tmp_path / "a.parquet"), "the column 'text' appears twice", "write the file again")
    make(
        tmp_path, {"a.jsonl": '{"text": "a", "more": {"text": "b", "x": {"text": "c"}}}\n{"text": "a", "text": "b"}\n'}
    )
    refused(lambda: texts_of(tmp_path / "a.jsonl"), "a.jsonl:2: the key 'text' appears twice")
    assert texts_of(tmp_path / "a.jsonl", skip=True) == ["a", None]


def test_a_column_by_a_name_with_a_dot(tmp_path):
    table = pyarrow.table({"meta": [{"text": "no"}], "meta.text": ["yes"], "other": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(lambda: texts_of(tmp_path / "a.parquet", text_key="meta"), "row 1: 'meta' is dict, not a string")


# Unusable records and files.


def test_unusable_records_have_a_reason_and_the_others_are_read(tmp_path):
    content = lines([{"text": "a"}]) + b'{"text": null}\n{"other": 1}\n{"text": 5}\n{"text": ["x"]}\n[1]\nnull\n{\n'
    content += b'{"text": "\xff"}\n' + b"[" * 50_000 + b'\n{"text": "b"}\n'
    make(tmp_path, {"a.jsonl": content, "b.txt": b"\xff", "c.txt": "c"})
    table = pyarrow.table({"text": ["p", None, "q"]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"other": ["p"]}), tmp_path / "e.parquet")
    packed = gzip.compress(lines([{"text": f"{i}" * 40} for i in range(3000)]))
    make(tmp_path, {"f.jsonl.gz": packed[: len(packed) // 2], "g.jsonl": '{"text": "end"}'})
    inputs = [
        tmp_path / name for name in ("a.jsonl", "b.txt", "c.txt", "d.parquet", "e.parquet", "f.jsonl.gz", "g.jsonl")
    ]
    files = list_files(parse_inputs(inputs))
    documents = list(read_documents(files, records=TEXT_RECORDS, skip=True))
    found = [d.text if d.bad is None else f"!{d.bad.reason}" for d in documents if d.cursor.file != 5 or d.bad]
    a = ["a", *["!without text"] * 2, *["!not a string"] * 2, *["!malformed"] * 5, "b"]
    assert found == [*a, "!not UTF-8", "c", "p", "!without text", "q", "!without text", "!damaged", "end"]
    assert sum(document.num_bytes for document in documents) == sum(file.num_bytes for file in files)
    _continues_after_each(files, documents)


def _continues_after_each(files, documents: list[Document]) -> None:
    for i in range(0, len(documents), max(1, len(documents) // 40)):
        rest = list(read_documents(files, records=TEXT_RECORDS, skip=True, start=documents[i].cursor))
        assert [(d.text, d.cursor) for d in rest] == [(d.text, d.cursor) for d in documents[i + 1 :]]


def test_bytes_that_are_no_text_in_a_row(tmp_path):
    path = write_table(tmp_path / "a.parquet", pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()))
    refused(lambda: texts_of(path), "row 2: 'text' is not UTF-8")
    assert texts_of(path, skip=True) == ["a", None, "c"]
    # A column that is declared as text but holds other bytes.
    array = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).buffers()
    )
    path = write_table(tmp_path / "b.parquet", array)
    assert texts_of(path, skip=True) == ["a", None, "c"]


# Further cases.


@pytest.mark.parametrize("content", [b'[{"text": "a", "text": "b"}, {"text": "c", "m": {"text": 1}}]', b""])
def test_a_key_that_appears_twice_in_an_array_is_refused_like_in_a_line(tmp_path, content):
    name = "a.json" if content else "a.jsonl"
    content = content or b'{"text": "a", "text": "b"}\n{"text": "c", "m": {"text": 1}}\n'
    make(tmp_path, {name: content})
    refused(lambda: texts_of(tmp_path / name), "the key 'text' appears twice")
    assert texts_of(tmp_path / name, skip=True) == [None, "c"]


@pytest.mark.parametrize("name", ["a.jsonlines", "a.jl", "a.jl.gz"])
def test_json_lines_by_other_names_are_records(tmp_path, name):
    make(tmp_path, {name: gzip.compress(lines()) if name.endswith("gz") else lines()})
    assert texts_of(tmp_path / name) == texts_of(tmp_path) == TEXTS


def test_a_file_without_an_extension_is_to_be_given_one(tmp_path):
    make(tmp_path, {"corpus": lines()})
    refused(lambda: texts_of(tmp_path / "corpus"), "has no extension", ".txt for text, .jsonl for JSON lines")


@pytest.mark.parametrize("beside", ["data.xml", "data.arrow.gz", "data.parquet.gz", "data.parquet.zst"])
def test_a_readme_is_not_the_data_beside_it(tmp_path, beside):
    make(tmp_path, {"README.md": "about", "LICENSE.txt": "free", beside: b"text"})
    refused(lambda: texts_of(tmp_path), "1 of another extension", "0 of them not metadata such as a README")
    assert texts_of(tmp_path, skip=True) == ["free", "about"]


def test_a_readme_alone_and_records_by_its_names_are_data(tmp_path):
    make(tmp_path / "one", {"README.md": "about"})
    make(tmp_path / "two", {"licenses.jsonl": lines(), "x.csv": "text"})
    assert texts_of(tmp_path / "one") == ["about"] and texts_of(tmp_path / "two") == TEXTS


def test_a_link_to_a_file_that_is_read_gives_no_copy(tmp_path):
    make(tmp_path, {"blobs/0af": lines(), "data/part-1.jsonl": lines(RECORDS[:1])})
    for revision in ("r1", "r2"):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "a.jsonl").symlink_to("../blobs/0af")
    (tmp_path / "data/latest.jsonl").symlink_to("part-1.jsonl")
    left_out = LeftOut()
    assert texts_of(tmp_path, left_out=left_out) == [TEXTS[0], *TEXTS]
    assert left_out.counts["linked twice"] == 2


def test_folders_of_splits_are_noted_for_texts_too(tmp_path):
    make(tmp_path / "data", {"train/a.txt": "a", "test/b.txt": "b"})
    make(tmp_path / "code", {"train.py": "a", "test.py": "b"})
    for name, notes in (("data", 1), ("code", 0)):
        left_out = LeftOut()
        texts_of(tmp_path / name, left_out=left_out)
        assert len(left_out.notes) == notes
