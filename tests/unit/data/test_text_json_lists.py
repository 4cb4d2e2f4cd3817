"""Lists of records under a key of the one object in a .json file: ``{"version": 1, "data": [...]}``."""

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.text import json_values
from titan_attent.data.text.documents import Document, read_documents
from titan_attent.data.text.inputs import list_files
from titan_attent.data.text.records import make_records

TEXTS = ["one\ntwo", "漢字 “q”", "", "{braces} [too]", "last"]
ROWS = [{"id": i, "text": text, "data": [{"text": "inner"}]} for i, text in enumerate(TEXTS)]
OBJECTS = {
    "alone": {"data": ROWS},
    "first": {"data": ROWS, "more": [{"text": "x"}], "version": "1"},
    "last": {"version": 1.5, "e": -1.25e-7, "nested": {"data": [{"text": "x"}]}, "data": ROWS},
    "after a long value": {"about": "data " * 500, "data": ROWS},
    "empty": {"data": []},
}


def put(path: Path, content: Any, **options: Any) -> Path:
    content = content if isinstance(content, str) else json.dumps(content, **options)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def documents_of(path: Path, *, key: str | None = "data", **options: Any) -> list[Document]:
    records = make_records(records_key=key)
    return list(read_documents(list_files(parse_inputs([path]), records=records), records=records, **options))


def texts_of(path: Path, **options: Any) -> list[str | None]:
    return [document.text for document in documents_of(path, **options)]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("head", [2**16, 16, 17, 19])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("shape", OBJECTS)
def test_the_records_of_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, indent: int | None, head: int, name: str
) -> None:
    monkeypatch.setattr(json_values, "HEAD", head)
    path = put(tmp_path / name, OBJECTS[shape], indent=indent)
    documents = documents_of(path)
    expected = [] if shape == "empty" else TEXTS
    assert [document.text for document in documents] == expected
    if head > 16 and shape != "empty":
        assert texts_of(tmp_path) == expected, "found in its folder"
        for i, document in enumerate(documents):
            records = make_records(records_key="data")
            files = list_files(parse_inputs([path]), records=records)
            rest = read_documents(files, records=records, start=document.cursor)
            assert [one.text for one in rest] == TEXTS[i + 1 :]


def test_other_json_files_beside_it_are_read_as_without_the_key(tmp_path: Path) -> None:
    put(tmp_path / "a.json", {"data": ROWS})
    put(tmp_path / "b.json", ROWS)
    (tmp_path / "c.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "d.jsonl").write_text(json.dumps({"data": ROWS, "text": "x"}))
    assert texts_of(tmp_path) == [*TEXTS * 3, "x"]


def test_the_key_is_named_where_it_is_missing(tmp_path: Path) -> None:
    for path in (put(tmp_path / "a.json", {"v": 1, "rows": ROWS}), put(tmp_path / "b.json", {"rows": ROWS}, indent=1)):
        with pytest.raises(ValueError, match="no key 'text'; .* read its list of records with --records-key rows"):
            texts_of(path, key=None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"rows": [], "x": 3}',
            "a.json: no key 'data' of a list of records; its keys are 'rows', 'x'",
        ),
        ('{"data": 3}', "a.json: the value of 'data' is not a list of records; choose another --records-key"),
        ('{"data": ["x"]}', "a.json: record 1: a JSON str where an object"),
        ('{"data": [{"text": "x"}, {"body": "y"}]}', "a.json: record 2: no key 'text'"),
        ('{"data": [{"text": "x"}], "data": []}', "malformed JSON (the key 'data' appears twice) after record 1"),
        ('{"data": [{"text": "x"}]', "malformed JSON (the object has no end) after record 1"),
        ('{"data": [{"text": "x"}', "malformed JSON (the array has no end) after record 1"),
        (
            '{"data": [{"text": "x"}], "a" 1}',
            "malformed JSON (a key and ':' are expected in the object)",
        ),
        ('{"data": [{"text": "x"}]} 3', "malformed JSON (unexpected content after the object) after record 1"),
        ('{"data": [{"text": "x"}] "a": 1}', "malformed JSON ('\"' where ',' or '}' is expected) after record 1"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, content: str, words: str) -> None:
    path = put(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        texts_of(path)
    assert "--on-bad skip" in str(caught.value)
    kept = [text for text in texts_of(path, skip=True) if text is not None]
    assert kept == (["x"] if '{"text": "x"}' in content else [])


def test_random_objects_are_read_as_json_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "HEAD", 16)
    generator = random.Random(0)

    def value(depth: int) -> Any:
        kind = generator.randrange(6 if depth else 4)
        if kind < 4:
            return [generator.random(), None, '}]"\\,:' + "é" * generator.randrange(20), generator.randrange(99)][kind]
        inner = [value(depth - 1) for _ in range(generator.randrange(4))]
        return inner if kind == 4 else {f"k{i}": one for i, one in enumerate(inner)}

    for _ in range(60):
        items = [(f"key {i}", value(2)) for i in range(generator.randrange(5))]
        rows = [{"text": str(value(0)), "more": value(2)} for _ in range(generator.randrange(5))]
        items.insert(generator.randrange(len(items) + 1), ("data", rows))
        path = put(tmp_path / "a.json", dict(items), indent=generator.choice([None, 2]))
        assert texts_of(path) == [row["text"] for row in json.loads(path.read_text())["data"]]


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", {"about": "x", "data": [{"text": "x" * 5000}] * 2000})
    records = make_records(records_key="data")
    tracemalloc.start()
    try:
        documents = read_documents(list_files(parse_inputs([path]), records=records), records=records)
        assert sum(document.text is not None for document in documents) == 2000
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()
