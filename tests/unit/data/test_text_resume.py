"""A bad record loses no finished shard; skipped records are counted and listed, also after a crash."""

import base64
import json
import os
import random
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from titan_attent.data.text import writer
from titan_attent.data.text.__main__ import main
from titan_attent.data.text.writer import TextSummary, write_dataset


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A rank file of the 256 bytes: id = byte, eos = 256."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    return str(path)


def texts_of(folder: Path) -> list[str]:
    """The documents, read without the package."""
    index = json.loads((folder / "index.json").read_text())
    stream = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in index["shards"]]).tolist()
    documents: list[str] = []
    current: list[int] = []
    for token in stream:
        if token == 256:
            documents.append(bytes(current).decode())
            current = []
        else:
            current.append(token)
    assert not current and len(documents) == index["num_documents"]
    return documents


def skipped(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return [(os.path.basename(line["where"]), line["reason"]) for line in map(json.loads, lines)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(first: int, last: int) -> list[str]:
    return [json.dumps({"text": f"document {i}"}) for i in range(first, last)]


def documents(first: int, last: int) -> list[str]:
    return [f"document {i}" for i in range(first, last)]


def put(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three files; the second has a record with a null text."""
    return [
        put(tmp_path / "a.jsonl", rows(0, 20)),
        put(tmp_path / "b.jsonl", [*rows(20, 40), '{"text": null}', *rows(40, 45)]),
        put(tmp_path / "c.jsonl", rows(45, 60)),
    ]


def write(inputs: list[Path], output: Path, ranks: str, **options: object) -> TextSummary:
    options = {"shard_tokens": 60, "num_threads": 1, **options}
    return write_dataset(inputs, output=output, tokenizer=ranks, **options)  # type: ignore[arg-type]


def stopped(inputs: list[Path], output: Path, ranks: str) -> int:
    """Shards finished by a writer that stops at the null."""
    with pytest.raises(ValueError, match=r"b.jsonl:21: 'text' is NoneType, not a string; .* with --on-bad skip"):
        write(inputs, output, ranks)
    shards = sorted(output.glob("shard-*.bin"))
    assert len(shards) > 4
    return len(shards)


@pytest.fixture(autouse=True)
def _nothing_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk per document: all records before a bad one are in finished shards."""
    monkeypatch.setattr("titan_attent.data.text.encode.CHUNK_CHARACTERS", 1)


@pytest.mark.parametrize("fix", ["remove", "correct", "remove the rest", "skip", "add a file", "another size in front"])
def test_a_fixed_input_is_resumed(inputs: list[Path], ranks: str, tmp_path: Path, fix: str) -> None:
    output = tmp_path / "out"
    num_shards = stopped(inputs, output, ranks)
    before = {f"shard-{i:05d}.bin": (output / f"shard-{i:05d}.bin").stat().st_mtime_ns for i in range(num_shards)}
    lines = inputs[1].read_text().splitlines()
    options: dict[str, object] = {}
    if fix == "skip":
        options = {"on_bad": "skip"}
    elif fix == "correct":
        put(inputs[1], [*lines[:20], '{"text": "fixed"}', *lines[21:]])
    elif fix == "remove the rest":
        put(inputs[1], lines[:20])
    else:
        put(inputs[1], [*lines[:20], *lines[21:]])
    if fix == "add a file":
        inputs.append(put(tmp_path / "d.jsonl", rows(60, 70)))
    if fix == "another size in front":  # the same records with other white space: only the texts are compared
        inputs[0].write_text("".join(line.replace(": ", ":   ") + "\n\n" for line in rows(0, 20)))
    summary = write(inputs, output, ranks, **options)
    expected = {
        "correct": [*documents(0, 40), "fixed", *documents(40, 60)],
        "remove the rest": [*documents(0, 40), *documents(45, 60)],
        "add a file": documents(0, 70),
    }
    assert texts_of(output) == expected.get(fix, documents(0, 60))
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before  # not written again
    assert summary.skipped == ({"without text": 1} if fix == "skip" else {})
    write(inputs, tmp_path / "whole", ranks, **options)
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", ["a text in front", "a record less in front", "a file less", "a file in front", "a file of another name"]
)
def test_inputs_that_begin_otherwise_are_not_resumed(
    inputs: list[Path], ranks: str, tmp_path: Path, change: str
) -> None:
    output = tmp_path / "out"
    stopped(inputs, output, ranks)
    before = contents(output)
    lines = inputs[1].read_text().splitlines()
    put(inputs[1], [*lines[:20], *lines[21:]])
    if change == "a text in front":
        put(inputs[0], [rows(0, 20)[0].replace("document", "Document"), *rows(1, 20)])
    elif change == "a record less in front":
        put(inputs[1], lines[1:20])
    elif change == "a file less":
        inputs = inputs[1:]
    elif change == "a file in front":
        inputs = [put(tmp_path / "0.jsonl", rows(90, 91)), *inputs]
    else:
        inputs = [inputs[0].rename(tmp_path / "z.jsonl"), *inputs[1:]]
    with pytest.raises(
        ValueError, match=r"inputs was '3 files.*\(inputs may change only after their first \d+ records"
    ):
        write(inputs, output, ranks)
    assert contents(output) == before


def test_a_fixed_input_of_other_sources_and_formats(ranks: str, tmp_path: Path) -> None:
    """Parquet, an array and texts, each with a name; the cursor is in the array."""
    pyarrow.parquet.write_table(pyarrow.table({"text": documents(0, 9)}), tmp_path / "a.parquet")
    records = [{"text": text} for text in documents(10, 30)]
    (tmp_path / "b.json").write_text(json.dumps([*records, {"text": 5}]))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.txt").write_text("text")
    named = [f"web={tmp_path}/a.parquet", f"code={tmp_path}/t", f"code={tmp_path}/b.json"]
    options = {"output": tmp_path / "out", "tokenizer": ranks, "shard_tokens": 50}
    with pytest.raises(ValueError, match="b.json: record 21: 'text' is int, not a string"):
        write_dataset(named, **options)  # type: ignore[arg-type]
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    named.append(f"more={put(tmp_path / 'c.jsonl', rows(30, 31))}")
    summary = write_dataset(named, **options)  # type: ignore[arg-type]
    assert texts_of(tmp_path / "out") == [*documents(0, 9), "text", *documents(10, 31)]
    assert list(summary.source_tokens) == ["web", "code", "more"]


def test_skipped_records_are_reported_and_listed(
    inputs: list[Path], ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = put(tmp_path / "bad.jsonl", ["{", '{"other": 1}', '{"text": 3}', '{"text": ""}', '{"text": "a\\ud800"}'])
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in (("x.txt", b"x"), ("y.txt", b"\0"), ("z.txt", b"\xff"), (".hidden", b"h"), ("p.png", b"p")):
        (folder / name).write_bytes(content)
    command = [*map(str, inputs), str(bad), str(folder), "--output", str(tmp_path / "out"), "--tokenizer", ranks]
    assert main([*command, "--on-bad", "skip"]) == 0
    assert texts_of(tmp_path / "out") == [*documents(0, 60), "", "a\ufffd", "x"]
    listed = [("b.jsonl:21", "without text"), ("bad.jsonl:1", "malformed"), ("bad.jsonl:2", "without text")]
    listed += [("bad.jsonl:3", "not a string"), ("y.txt", "binary"), ("z.txt", "not UTF-8")]
    assert skipped(tmp_path / "out") == listed
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: skipped 2 files that are binary or not UTF-8, 1 malformed, 1 not a string, 2 without text (all in "
        f"{tmp_path}/out/skipped.jsonl); left out 1 hidden (first: {folder}/.hidden), 1 of another extension (first: "
        f"{folder}/p.png); 1 documents are empty; 1 documents had lone surrogates, now U+FFFD"
    ]


def test_reasons_are_kept_where_nothing_is_left(ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = put(tmp_path / "bad.jsonl", ["{", '{"other": 1}', '{"other": 2}'])
    command = [str(bad), "--output", str(tmp_path / "out"), "--tokenizer", ranks]
    assert main([*command, "--on-bad", "skip"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for word in ("no document in these inputs", "1 malformed; 2 without text; all of them in", "out/skipped.jsonl"):
        assert word in message
    assert len(skipped(tmp_path / "out")) == 3
    # The folder can be used by the corrected command, and then lists only its skipped records.
    put(bad, ['{"text": 1}', '{"text": "a"}'])
    assert main([*command, "--on-bad", "skip"]) == 0
    assert skipped(tmp_path / "out") == [("bad.jsonl:1", "not a string")]


class Crash(BaseException):
    """Not an Exception, so that nothing can handle it."""


def test_a_crash_at_any_document_skips_the_same(ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    lines = [generator.choice([row, row, '{"text": 1}', "{", '{"text": ""}']) for row in rows(0, 40)]
    source = put(tmp_path / "a.jsonl", lines)
    options = {"on_bad": "skip", "shard_tokens": 30}
    whole = write([source], tmp_path / "whole", ranks, **options)
    assert sum(whole.skipped.values()) == sum(line in ("{", '{"text": 1}') for line in lines) > 5
    assert whole.noted == {"are empty": sum(line == '{"text": ""}' for line in lines)}
    append, calls = writer.ShardWriter.append, count()

    def crashing(self: writer.ShardWriter, tokens: np.ndarray) -> None:
        if next(calls) == crash_at:
            raise Crash
        append(self, tokens)

    for crash_at in range(whole.num_documents):
        output, calls = tmp_path / f"crash-{crash_at}", count()
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(writer.ShardWriter, "append", crashing)
            write([source], output, ranks, **options)
        summary = write([source], output, ranks, **options)
        assert contents(output) == contents(tmp_path / "whole")
        assert (summary.skipped, summary.noted) == (whole.skipped, whole.noted)


def test_on_bad_has_two_values(inputs: list[Path], ranks: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='on_bad is \'drop\'; it is "refuse" or "skip"'):
        write(inputs, tmp_path / "out", ranks, on_bad="drop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cursor": [0, 1.0, 0]}, r"cursor\[1\] is 1.0, of type float: expected"),
        ({"cursor": [0, 1]}, "cursor is of type list: expected a list of 3"),
        ({"cursor": [0, -1, 0]}, "a count is -1"),
        ({"cursor": [9, 0, 0]}, r"malformed \(cursor "),
        ({"num_documents": 3.5}, "num_documents is 3.5"),
        ({"num_documents": -3}, "a count is -3"),
        ({"num_skipped": 2**64}, "expected a number of 64 bits"),
        ({"skipped": {"x": -1}}, "a count is -1"),
        ({"skipped_bytes": 10**6}, "skipped.jsonl: is missing or truncated"),
        ({"shards": [{"file": "shard-00000.bin", "num_tokens": 2**62, "sha256": ""}]}, "missing or truncated"),
        ({"shards": [{"file": "shard-00000.bin", "num_tokens": None, "sha256": ""}]}, r"shards\[0\].num_tokens is"),
        ({"tokenizer": {"file": "tokenizer.tiktoken", "name": "x", "vocab_size": 2**33, "eos_id": 1}}, "vocab_size is"),
        ({"tokenizer": {"name": "x", "vocab_size": 257, "eos_id": 256}}, "tokenizer without file"),
        ({"consumed": {"num_records": "x"}}, "consumed.num_records is 'x'"),
        ({"deep": None}, "has the unknown field 'deep'"),
    ],
)
def test_progress_of_unknown_origin_is_one_error(
    inputs: list[Path], ranks: str, tmp_path: Path, change, message
) -> None:
    output = tmp_path / "out"
    stopped(inputs, output, ranks)
    progress = json.loads((output / "progress.json").read_text())
    (output / "progress.json").write_text(json.dumps({**progress, **change}))
    with pytest.raises(ValueError, match=message):
        write(inputs, output, ranks, on_bad="skip")
    (output / "progress.json").write_text('{"shards": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"progress.json: malformed \(is nested too deeply\); delete .* to start anew"):
        write(inputs, output, ranks, on_bad="skip")


def test_a_run_of_an_earlier_version_is_resumed_with_the_same_inputs_alone(
    inputs: list[Path], ranks: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stopped(inputs, output, ranks)
    progress = json.loads((output / "progress.json").read_text())
    for name in ("skipped", "skipped_bytes", "noted", "consumed"):
        del progress[name]
    (output / "progress.json").write_text(json.dumps(progress))
    content = inputs[2].read_text()
    put(inputs[2], rows(0, 3))
    with pytest.raises(ValueError, match="inputs was '3 files"):
        write(inputs, output, ranks, on_bad="skip")
    stat = inputs[2].stat()
    inputs[2].write_text(content)
    assert stat.st_size != len(content)
    # The description of the inputs as the earlier version wrote it.
    progress["arguments"]["inputs"] = writer.run_arguments(
        writer.list_files([("default", path) for path in inputs]), tokenizer=ranks
    )["inputs"]
    (output / "progress.json").write_text(json.dumps(progress))
    summary = write(inputs, output, ranks, on_bad="skip")
    assert texts_of(output) == documents(0, 60)
    assert summary.skipped == {"without text": 1}


def test_a_run_of_an_earlier_version_that_read_json_as_text_is_not_mixed(ranks: str, tmp_path: Path) -> None:
    inputs, output = (
        [put(tmp_path / "a.json", rows(0, 20)), put(tmp_path / "b.json", [*rows(0, 2), "{"])],
        tmp_path / "o",
    )
    with pytest.raises(ValueError, match="malformed JSON line"):
        write(inputs, output, ranks)
    progress = json.loads((output / "progress.json").read_text())
    del progress["consumed"]
    (output / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(ValueError, match=r"earlier version, which read .json files as texts; delete it"):
        write(inputs, output, ranks, on_bad="skip")
