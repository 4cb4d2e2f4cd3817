"""What the writer leaves in its folder: two sets by a hash, an overwritten set, nothing after a refusal; its report."""

import base64
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from titan_attent.data.text import sample, writer
from titan_attent.data.text.__main__ import main
from titan_attent.data.text.held_out import is_held_out
from titan_attent.data.text.writer import write_dataset

FRACTION = 0.2


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A rank file of the 256 bytes: id = byte, eos = 256."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    return str(path)


def texts_of(folder: Path) -> list[str]:
    """The documents, read without the package."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    stream = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in shards])
    documents = np.split(stream, np.flatnonzero(stream == 256) + 1)
    assert not len(documents[-1])
    return [bytes(document[:-1].tolist()).decode() for document in documents[:-1]]


def put(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def lines(texts: list[str]) -> list[str]:
    return [json.dumps({"text": text}) for text in texts]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Three sources of 150, 100 and 50 documents, of which some are copies of others."""
    sizes = {"web": 150, "code": 100, "books": 50}
    for name, size in sizes.items():
        put(tmp_path / f"{name}.jsonl", lines([f"{name if i % 5 else 'copy'} {i}" for i in range(size)]))
    return [f"{name}={tmp_path / name}.jsonl" for name in sizes]


def write(inputs: list[str], output: Path, tokenizer: str, **options: object) -> writer.TextSummary:
    options = {"shard_tokens": 300, "num_threads": 1, "validation_fraction": FRACTION, **options}
    return write_dataset(inputs, output=output, tokenizer=tokenizer, **options)  # type: ignore[arg-type]


# Two sets.


def test_every_document_is_in_one_set_by_its_text(inputs: list[str], ranks: str, tmp_path: Path) -> None:
    summary = write(inputs, tmp_path / "out", ranks)
    train, held_out = (texts_of(tmp_path / "out" / name) for name in ("train", "validation"))
    all_texts = [
        json.loads(line)["text"] for item in inputs for line in Path(item.split("=")[1]).read_text().splitlines()
    ]
    assert [text for text in all_texts if is_held_out(text, FRACTION)] == held_out
    assert [text for text in all_texts if not is_held_out(text, FRACTION)] == train
    assert not set(train) & set(held_out), "no copy of a document is in the other set"
    assert 0.1 < len(held_out) / len(all_texts) < 0.3
    assert (summary.num_documents, summary.validation[0]) == (len(train), len(held_out))  # type: ignore[index]
    index = json.loads((tmp_path / "out" / "validation" / "index.json").read_text())
    assert {shard["source"] for shard in index["shards"]} == {"web", "code", "books"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "validation"]


def test_the_order_of_inputs_holds_out_the_same(inputs: list[str], ranks: str, tmp_path: Path) -> None:
    sets = []
    for number, order in enumerate(itertools.permutations(inputs)):
        write(list(order), tmp_path / f"out{number}", ranks)
        sets.append(sorted(texts_of(tmp_path / f"out{number}" / "validation")))
    assert all(one == sets[0] for one in sets)


class Crash(BaseException):
    """Not an Exception, so that nothing can handle it."""


def test_a_crash_anywhere_gives_the_same_two_sets(
    inputs: list[str],
    ranks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("titan_attent.data.text.encode.CHUNK_CHARACTERS", 1)
    write(inputs, tmp_path / "whole", ranks)
    expected, count, write_index = tree(tmp_path / "whole"), writer._count, writer.write_index
    generator = random.Random(0)
    for trial in range(6):
        output, resumed = tmp_path / f"out{trial}", 0
        while not (output / "train" / "index.json").exists():
            left = generator.randint(20, 90)

            def crashing(*args: object, **options: object) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Crash
                count(*args, **options)  # type: ignore[arg-type]

            def one_index(folder: Path, **options: object) -> object:
                if folder.name == "train" and generator.random() < 0.5:
                    raise Crash
                return write_index(folder, **options)  # type: ignore[arg-type]

            monkeypatch.setattr(writer, "_count", crashing)
            monkeypatch.setattr(writer, "write_index", one_index)
            try:
                write(inputs, output, ranks)
            except Crash:
                resumed += 1
        assert resumed > 1 and tree(output) == expected


def test_a_trained_tokenizer_does_not_see_the_held_out(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(200)]
    secret = [f"{text} " + "zqzqzqzq" * 20 for text in texts if is_held_out(text, FRACTION)]
    texts += [text for text in secret if is_held_out(text, FRACTION)]
    assert texts[-1].endswith("zqzqzqzq")
    put(tmp_path / "a.jsonl", lines(texts))
    write([str(tmp_path / "a.jsonl")], tmp_path / "split", "train:300")
    write([str(tmp_path / "a.jsonl")], tmp_path / "whole", "train:300", validation_fraction=None)
    learned = [
        any(b"enpxen" in line or b"enF6" in line for line in (folder / "tokenizer.tiktoken").read_bytes().splitlines())
        for folder in (tmp_path / "split" / "train", tmp_path / "whole")
    ]
    assert learned == [False, True]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.6, float("nan")])
def test_a_fraction_is_a_share(inputs: list[str], ranks: str, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 0.5"):
        write(inputs, tmp_path / "out", ranks, validation_fraction=fraction)


def test_a_split_is_not_mixed_with_another_run(inputs: list[str], ranks: str, tmp_path: Path) -> None:
    write(inputs, tmp_path / "out", ranks)
    before = tree(tmp_path / "out")
    for fraction in (None, FRACTION, 0.1):
        with pytest.raises(ValueError, match="out/train: holds a finished data set"):
            write(inputs, tmp_path / "out", ranks, validation_fraction=fraction)
    assert tree(tmp_path / "out") == before


# Overwriting and refusals.


def test_overwriting_replaces_a_set_and_keeps_other_files(inputs: list[str], ranks: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(inputs, output, ranks, shard_tokens=20)
    (output / "notes.txt").write_text("mine")
    write(inputs[:1], output, ranks, validation_fraction=None, overwrite=True)
    write(inputs[:1], tmp_path / "new", ranks, validation_fraction=None)
    assert tree(output) == {**tree(tmp_path / "new"), "notes.txt": b"mine"}
    tokenizer = str(output / "tokenizer.tiktoken")
    write(inputs[:1], output, tokenizer, validation_fraction=None, overwrite=True)  # its own tokenizer
    assert tree(output).keys() == {*tree(tmp_path / "new"), "notes.txt"}


def test_a_refused_overwrite_deletes_nothing(inputs: list[str], ranks: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(inputs, output, ranks)
    before = tree(output)
    for arguments in ({"tokenizer": "none"}, {"tokenizer": "train:x"}, {"inputs": [str(tmp_path / "none.jsonl")]}):
        with pytest.raises(ValueError):
            write(**{"inputs": inputs, "output": output, "tokenizer": ranks, "overwrite": True, **arguments})  # type: ignore[arg-type]
        assert tree(output) == before
    put(output / "skipped.jsonl", lines(["a"]))
    with pytest.raises(ValueError, match="is an input, and --overwrite would delete it"):
        write([str(output / "skipped.jsonl")], output, ranks, overwrite=True)
    (output / "index.json").write_text('{"format": "titan_attent.images"}')
    with pytest.raises(ValueError, match="not that of a data set of text"):
        write(inputs, output, ranks, overwrite=True)
    assert tree(output).keys() == {*before, "skipped.jsonl", "index.json"}


@pytest.mark.parametrize("split", [None, FRACTION])
@pytest.mark.parametrize(
    ("bad", "tokenizer"),
    [
        ('{"other": 1}', ""),
        ('{"other": 1}', "train:300"),
        ('{"text": "a"}', "train:x"),
        ('{"text": "a"}', "train:3"),
        ('{"text": "a"}', "no such encoding"),
    ],
)
def test_a_refused_command_leaves_nothing(
    ranks: str,
    tmp_path: Path,
    bad: str,
    tokenizer: str,
    split: float | None,
) -> None:
    data = str(put(tmp_path / "a.jsonl", [*lines(["one", "two"]), bad]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError):
        write(
            [str(tmp_path / "a.jsonl")], tmp_path / "new" / "er" / "out", tokenizer or ranks, validation_fraction=split
        )
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError):
        write([data], tmp_path / "out", tokenizer or ranks, validation_fraction=split)
    assert tree(tmp_path / "out") == {"notes.txt": b"mine"}


def test_too_few_documents_for_two_sets_leave_nothing(ranks: str, tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", lines(["one document"]))
    with pytest.raises(ValueError, match="none of the 1 documents is in the .* data; give more documents"):
        write([str(tmp_path / "a.jsonl")], tmp_path / "out", ranks)
    assert not (tmp_path / "out").exists()


def test_a_second_writer_deletes_nothing_of_the_first(inputs: list[str], ranks: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with writer.opened(output):
        (output / "progress.json").write_text("{}")
        with pytest.raises(ValueError, match="another writer"), writer.opened(output):
            pass
        assert tree(output) == {"progress.json": b"{}"}


# The tokenizer's sample, and what is reported.


def test_a_small_source_is_in_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources give text by their size, whatever the order; a source that is small gives all that it has."""
    monkeypatch.setattr(sample, "SPAN_BYTES", 500)
    put(tmp_path / "large.jsonl", lines([f"large {i}" for i in range(4_000)]))
    put(tmp_path / "second.jsonl", lines([f"second {i}" for i in range(2_000)]))
    put(tmp_path / "small.jsonl", lines([f"small {i}" for i in range(10)]))
    inputs = [f"{name}={tmp_path / name}.jsonl" for name in ("large", "second", "small")]
    tokenizers = []
    for number, order in enumerate(itertools.permutations(inputs)):
        files = writer.list_files(writer.parse_any_inputs(order))
        reading = {"num_bytes": 20_000, "records": writer.make_records(text_key=None), "max_bytes": 2**20}
        texts = list(sample.sample_texts(files, **reading))  # type: ignore[arg-type]
        sizes = [sum(len(text) for text in texts if text.startswith(name)) for name in ("large", "second", "small")]
        assert 1.5 < sizes[0] / sizes[1] < 2.5 and sum(text.startswith("small") for text in texts) == 10
        assert sum(sizes) <= 20_000
        if number not in (0, 5):  # opposite orders
            continue
        options = {"validation_fraction": None, "max_training_bytes": 20_000}
        write(list(order), tmp_path / f"out{number}", "train:400", **options)
        tokenizers.append((tmp_path / f"out{number}" / "tokenizer.tiktoken").read_bytes())
    assert len(tokenizers) == 2 and tokenizers[0] == tokenizers[1]


def test_training_a_tokenizer_and_the_files_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        put(folder / name, lines(["some text of a document"] * 50))
    for name in ("d.csv", "e.csv", "README", "f.pdf"):
        (folder / name).write_text("x")
    command = [sys.executable, "-m", "titan_attent.data.text", str(folder), "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--tokenizer", "train:300"], capture_output=True, text=True, check=True)
    assert "text for the tokenizer" in done.stderr and f"from {23 * 150:,} bytes" in done.stderr
    assert done.stdout.splitlines()[0] == "read 2 .jsonl, 1 .json"
    assert "4 beside records (first: " in done.stderr and "; 2 .csv, 1 .pdf, 1 without extension)" in done.stderr


def test_the_command_has_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.jsonl", lines([f"document {i}" for i in range(60)]))
    command = [str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--tokenizer", "train:300"]
    command += ["--validation-fraction", "0.1", "--num-threads", "1"]
    assert main(command) == 0
    train, validation = capsys.readouterr().out.splitlines()
    assert train.startswith(f"{tmp_path}/out/train: ") and validation.startswith(f"{tmp_path}/out/validation: ")
    assert main(command) == 2
    assert "delete it with --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
