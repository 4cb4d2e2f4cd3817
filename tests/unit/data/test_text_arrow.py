"""Documents of Arrow files and of folders of ``save_to_disk``: what is read, in which order, and what is refused."""

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text import arrow_text
from titan_attent.data.text.documents import Document, read_documents
from titan_attent.data.text.inputs import InputFile, list_files
from titan_attent.data.text.records import Records, make_records

TEXTS = ["one\ntwo", "漢字 “q”", "", *(f"text {i} " * (i % 9) for i in range(40)), "last"]


def files_of(*inputs: Path | str, **options: Any) -> list[InputFile]:
    return list_files(parse_inputs(list(inputs)), **options)


def documents_of(*inputs: Path, records: Records | None = None, **options: Any) -> list[Document]:
    return list(read_documents(files_of(*inputs), records=records or make_records(), **options))


def texts_of(*inputs: Path, **options: Any) -> list[str | None]:
    return [document.text for document in documents_of(*inputs, **options)]


def table(texts: Sequence[str | None], kind: pyarrow.DataType | None = None) -> pyarrow.Table:
    column = pyarrow.array(texts, type=pyarrow.string()).cast(kind or pyarrow.string())
    return pyarrow.table({"id": list(range(len(texts))), "text": column, "more": texts})


def write_stream(path: Path, content: pyarrow.Table, **options: Any) -> Path:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=7)
    return path


def write_file(path: Path, content: pyarrow.Table, compression: str | None = None) -> Path:
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, content.schema, options=options) as writer:
        writer.write_table(content, max_chunksize=7)
    return path


def write_feather(path: Path, content: pyarrow.Table) -> Path:
    pyarrow.feather.write_feather(content, str(path), compression="zstd", chunksize=7)
    return path


WRITERS = {
    "stream.arrow": write_stream,
    "file.ARROW": write_file,
    "lz4.arrow": lambda path, content: write_file(path, content, "lz4"),
    "a.feather": write_feather,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_is_a_document(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, table(TEXTS))
    files = files_of(path, tmp_path)
    documents = list(read_documents(files, records=make_records()))
    assert [one.text for one in documents] == [*TEXTS, *TEXTS]
    assert sum(one.num_bytes for one in documents) <= 2 * path.stat().st_size
    for i in (0, 5, 6, 7, len(TEXTS) - 2, len(TEXTS) - 1, len(TEXTS)):
        rest = read_documents(files, records=make_records(), start=documents[i].cursor)
        assert [(one.text, one.cursor) for one in rest] == [(one.text, one.cursor) for one in documents[i + 1 :]]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("write", [write_stream, write_file])
def test_texts_of_all_types(tmp_path: Path, kind: pyarrow.DataType, write: Any) -> None:
    assert texts_of(write(tmp_path / "a.arrow", table(TEXTS, kind))) == TEXTS


def test_conversations_pairs_and_other_columns(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(20)]
    content = pyarrow.table({"m": messages, "p": [f"p{i}" for i in range(20)], "c": [f"c{i}" for i in range(20)]})
    path = write_stream(tmp_path / "a.arrow", content)
    rows = content.to_pylist()
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for records in (make_records(messages_key="m"), make_records(prompt_key="p", completion_key="c")):
        arrow, jsonl = (documents_of(one, records=records) for one in (path, lines))
        assert [one.segments for one in arrow] == [one.segments for one in jsonl] and len(arrow) == 20


# What is refused.


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = WRITERS[name](tmp_path / name, table(TEXTS * 9))
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "garbage": b"garbage" * 99, "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"{name}: damaged or not an Arrow file .*write it again.*--on-bad skip"):
        texts_of(path)
    texts = texts_of(path, skip=True)
    assert texts[-1] is None and texts[:-1] == (TEXTS * 9)[: len(texts) - 1], "what came before the damage is kept"


def test_feather_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(99))
    with pytest.raises(ValueError, match="Feather of version 1; write it as version 2"):
        texts_of(tmp_path / "a.feather")


@pytest.mark.parametrize("kind", ["offsets", "index", "list"])
def test_offsets_that_lead_elsewhere_are_not_followed(tmp_path: Path, kind: str) -> None:
    """Arrow itself would read memory that does not belong to the file."""
    offsets = pyarrow.array([0, 2, 2**30, 4], pyarrow.int32()).buffers()[1]
    data = pyarrow.py_buffer(b"abcd")
    array = {
        "offsets": lambda: pyarrow.StringArray.from_buffers(3, offsets, data),
        "index": lambda: pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0, 1, 100_000_000], pyarrow.int32()), ["a", "b"], safe=False
        ),
        "list": lambda: pyarrow.ListArray.from_buffers(
            pyarrow.list_(pyarrow.string()), 3, [None, offsets], children=[pyarrow.array(["a", "b", "c", "d"])]
        ),
    }[kind]()
    path = write_stream(tmp_path / "a.arrow", pyarrow.Table.from_batches([batch_of(array)]))
    with pytest.raises(ValueError, match="a.arrow: damaged or not an Arrow file"):
        texts_of(path)


def batch_of(array: pyarrow.Array) -> pyarrow.RecordBatch:
    return pyarrow.RecordBatch.from_arrays([array], ["text"])


def test_a_row_that_is_not_utf8(tmp_path: Path) -> None:
    array = pyarrow.array([b"a", b"\xff", None, b"d"], pyarrow.binary()).view(pyarrow.string())
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"text": array}))
    with pytest.raises(ValueError, match="a.arrow: row 2: 'text' is not UTF-8"):
        texts_of(path)
    documents = documents_of(path, skip=True)
    assert [one.text for one in documents] == ["a", None, None, "d"]
    assert [one.bad.reason for one in documents if one.bad] == ["not UTF-8", "without text"]


def test_columns_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.arrow", table(TEXTS))
    with pytest.raises(ValueError, match="a.arrow: no column 'body'; select the text with --text-key, one of 'id', 't"):
        texts_of(path, records=make_records(text_key="body"))
    with pytest.raises(ValueError, match="row 1: 'id' is int, not a string"):
        texts_of(path, records=make_records(text_key="id"))
    with pytest.raises(ValueError, match="row 1: more than 4 bytes of text"):
        texts_of(path, max_bytes=4)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["text", "text"])
    with pytest.raises(ValueError, match="the column 'text' appears twice"):
        texts_of(write_stream(tmp_path / "b.arrow", twice))


def test_compressed_arrow_files_are_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.arrow.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="unpack it first"):
        texts_of(tmp_path / "a.arrow.gz")


def test_one_large_batch_is_not_copied_to_memory(tmp_path: Path) -> None:
    content = pyarrow.table({"text": ["x" * 10_000] * 3000})
    path = tmp_path / "a.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content)
    del content
    before = pyarrow.total_allocated_bytes()
    for document in read_documents(files_of(path), records=make_records()):
        assert document.text is not None and len(document.text) == 10_000
        assert pyarrow.total_allocated_bytes() - before < 2**20


def test_only_the_columns_of_the_text_are_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_feather(tmp_path / "a.feather", table(TEXTS))
    seen: list[pyarrow.RecordBatch] = []
    check = arrow_text.ArrowRows._batches

    def batches(self: arrow_text.ArrowRows, *arguments: Any) -> Iterator[Any]:
        for one in check(self, *arguments):
            seen.append(one[0])
            yield one

    monkeypatch.setattr(arrow_text.ArrowRows, "_batches", batches)
    assert texts_of(path) == TEXTS
    assert {tuple(batch.schema.names) for batch in seen} == {("text",)}


# Folders.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one``: a data set of three files; ``two``: of two splits."""
    folder = tmp_path_factory.mktemp("saved")
    data = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    data.save_to_disk(str(folder / "one"), num_shards=3)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(folder / "two"))
    return folder


def test_a_saved_data_set(saved: Path, tmp_path: Path) -> None:
    assert texts_of(saved / "one") == TEXTS == datasets.load_from_disk(str(saved / "one"))["text"]
    assert texts_of(saved / "two" / "test") == TEXTS[1:2]
    with pytest.raises(ValueError, match=r"two: holds the splits train, test; name one to read it, such as \S+/train$"):
        files_of(saved / "two")
    shutil.copytree(saved / "two" / "train", tmp_path / "only" / "train")
    (tmp_path / "only" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts_of(tmp_path / "only") == TEXTS


def test_the_state_says_which_files_and_in_which_order(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "one", tmp_path / "one")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    shutil.copy(folder / "data-00000-of-00003.arrow", folder / "data-00000-of-00001.arrow")
    shutil.copy(folder / "data-00000-of-00003.arrow", folder / "cache-0123456789abcdef.arrow")
    left_out = LeftOut()
    files = files_of(folder, left_out=left_out)
    assert [file.path.name for file in files] == [f"data-0000{i}-of-00003.arrow" for i in (2, 1, 0)]
    assert [one.text for one in read_documents(files, records=make_records())] == (
        datasets.load_from_disk(str(folder))["text"]
    )
    assert left_out.summary().startswith("left out 2 not named by state.json")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow: is missing, and state.json beside it names it"),
        ({"_data_files": [{"filename": "../a.arrow"}]}, "its data file '../a.arrow' is not the name of a file in"),
        ({"_data_files": [3]}, "its data file None is not the name"),
        ({"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}, "chosen by indices, as datasets 1"),
    ],
)
def test_a_state_that_cannot_be_used(tmp_path: Path, state: dict[str, Any], words: str) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=words):
        files_of(tmp_path)


def test_arrow_files_of_a_folder_are_read_where_nothing_else_is(tmp_path: Path) -> None:
    """As in the cache of load_dataset; other files decide what earlier versions read of a folder."""
    write_stream(tmp_path / "b-train.arrow", table(TEXTS))
    shutil.copy(tmp_path / "b-train.arrow", tmp_path / "cache-00ff00ff00ff00ff.arrow")
    (tmp_path / "dataset_info.json").write_text("{}")
    left_out = LeftOut()
    files = files_of(tmp_path, left_out=left_out)
    assert [file.path.name for file in files] == ["b-train.arrow"]
    assert "1 caches of datasets (first: " in left_out.summary()
    contents = {"c.csv": "text\nx\n", "c.txt": "x", "c.jsonl": '{"text": "x"}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        read = [file.path.name for file in files_of(tmp_path, skip=True)]
        assert read == ([name, "dataset_info.json"] if name == "c.txt" else [name])
        os.unlink(tmp_path / name)
    (tmp_path / "c.jsonl").write_text("")
    named = files_of(tmp_path, extensions=["arrow", "jsonl"])
    assert [file.path.name for file in named] == ["b-train.arrow", "c.jsonl", "cache-00ff00ff00ff00ff.arrow"]


def test_random_tables_are_read_as_parquet_is(tmp_path: Path) -> None:
    generator = random.Random(0)
    for trial in range(20):
        texts = [
            None if generator.random() < 0.1 else "".join(generator.choices("ab漢\n\0", k=generator.randrange(9)))
            for _ in range(generator.randrange(1, 40))
        ]
        content = table(texts).slice(generator.randrange(3))
        write_stream(tmp_path / f"{trial}.arrow", content)
        pyarrow.parquet.write_table(content, tmp_path / f"{trial}.parquet")
        arrow, parquet = (texts_of(tmp_path / f"{trial}.{kind}", skip=True) for kind in ("arrow", "parquet"))
        assert arrow == parquet
