"""The writer against streams built by hand: with a tokenizer of single bytes, a document is its UTF-8 and eos."""

import base64
import fcntl
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate, count
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from titan_attent.data import writer as former
from titan_attent.data.io import folder as folder_names
from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.text import __main__ as text_command
from titan_attent.data.text import encode, writer
from titan_attent.data.text.__main__ import main
from titan_attent.data.text.documents import START, Document, read_documents
from titan_attent.data.text.inputs import list_files
from titan_attent.data.text.records import TEXT_RECORDS
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tiktoken_tokenizer import train_tokenizer
from titan_attent.data.text.tokenizer import load_tokenizer, open_tokenizer
from titan_attent.data.text.writer import TextSummary, write_dataset

EOS = 256
TEXTS = [f"document {i}: " + "漢字 and words\n" * (i % 7) for i in range(60)] + ["", "<|endoftext|>", "\x01 👩‍👧"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A rank file of the 256 bytes: id = byte, eos = 256."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    return str(path)


def by_hand(texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*text.encode(), EOS]]


def tokens_of(folder: Path) -> list[int]:
    """The stream, read without the package."""
    index = json.loads((folder / "index.json").read_text())
    parts = [np.fromfile(folder / shard["file"], dtype=index["dtype"]) for shard in index["shards"]]
    assert [len(part) for part in parts] == [shard["num_tokens"] for shard in index["shards"]]
    return np.concatenate(parts).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path: Path, texts: list[str], *, key: str = "text") -> Path:
    lines = [json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes("\n".join(lines).encode() + b"\n\n")
    return path


def write_gzip(path: Path, texts: list[str]) -> Path:
    plain = write_jsonl(path.with_suffix(".plain"), texts)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    table = pyarrow.table({"text": texts, "other": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def write_folder(path: Path, texts: list[str]) -> Path:
    """One file per text, named so that the paths have the order of the texts."""
    for i, text in enumerate(texts):
        file = path / f"{i // 10:02d}" / f"{i:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return path


KINDS = {"a.jsonl": write_jsonl, "a.jsonl.gz": write_gzip, "a.parquet": write_parquet, "a": write_folder}


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """TEXTS in one of the formats."""
    return KINDS[request.param](tmp_path / request.param, TEXTS)


def write(source: Path | str, output: Path, tokenizer: str, **options: object) -> TextSummary:
    return write_dataset([source], output=output, tokenizer=tokenizer, **options)  # type: ignore[arg-type]


# What is written.


def test_every_format_gives_the_stream(source: Path, ranks: str, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    summary = write(source, output, ranks)
    assert tokens_of(output) == by_hand(TEXTS)
    assert sorted(contents(output)) == [
        *("index.json", "lengths.bin", "shard-00000.bin", "shard-00000.documents", "tokenizer.tiktoken")
    ]
    shards = TokenShards(output)
    shards.verify_checksums()
    assert (summary.num_documents, summary.num_shards, summary.num_skipped) == (len(TEXTS), 1, 0)
    assert (summary.num_tokens, summary.fingerprint, summary.path) == (shards.num_tokens, shards.fingerprint, output)
    assert (shards.index.num_documents, shards.max_token_id, shards.dtype) == (len(TEXTS), EOS, np.dtype("uint16"))
    assert shards.has_documents and not shards.has_mask
    assert shards.document_ends(0, 0, len(TEXTS)).tolist() == [*accumulate(len(by_hand([text])) for text in TEXTS)]
    tokenizer = open_tokenizer(shards.tokenizer_info, output)
    assert tokenizer.decode(shards.read(0, shards.num_tokens)) == "".join(text + "<|endoftext|>" for text in TEXTS)


@pytest.mark.parametrize("shard_tokens", [1, 100, 1000, 10**6])
def test_shards_close_at_the_end_of_a_document(source: Path, ranks: str, tmp_path: Path, shard_tokens: int) -> None:
    output = tmp_path / "out"
    write(source, output, ranks, shard_tokens=shard_tokens)
    assert tokens_of(output) == by_hand(TEXTS)
    expected, size = [], 0
    for text in TEXTS:
        size += len(text.encode()) + 1
        if size >= shard_tokens:
            expected.append(size)
            size = 0
    assert [shard.num_tokens for shard in TokenShards(output).index.shards] == expected + [size] * (size > 0)


def test_neither_threads_nor_chunks_change_a_byte(
    source: Path, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, tmp_path / "one", ranks, shard_tokens=500, num_threads=1)
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 40)
    write(source, tmp_path / "many", ranks, shard_tokens=500, num_threads=7)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_inputs_keep_their_order(ranks: str, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "z.jsonl", ["first"])
    second = tmp_path / "a.txt"
    second.write_bytes(b"one\r\ntwo\r")
    inputs = [str(first), second, first]
    write_dataset(inputs, output=tmp_path / "out", tokenizer=ranks)
    assert tokens_of(tmp_path / "out") == by_hand(["first", "one\r\ntwo\r", "first"])
    write_dataset(str(second), output=tmp_path / "single", tokenizer=ranks)  # type: ignore[arg-type]
    assert tokens_of(tmp_path / "single") == by_hand(["one\r\ntwo\r"])


def test_folder_reads_text_in_the_order_of_paths(ranks: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name, content in {
        "b.py": b"b",
        "B.TXT": b"upper",
        "a/z.md": b"z",
        "a.txt": b"a",
        "empty.py": b"",
        "image.txt": b"text\0binary",
        "latin.md": "é".encode("latin-1"),
        ".git/config.txt": b"hidden",
        "skipped.bin": b"other extension",
        "noextension": b"none",
        "records.jsonl": b"not even JSON",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "dead.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    summary = write(folder, tmp_path / "out", ranks)
    # Sorted by code point: B.TXT < a.txt < a/z.md < b.py < empty.py.
    assert tokens_of(tmp_path / "out") == by_hand(["upper", "a", "z", "b", ""])
    assert (summary.num_documents, summary.num_skipped) == (5, 2)
    write(folder, tmp_path / "bin", ranks, extensions=["bin"])
    assert tokens_of(tmp_path / "bin") == by_hand(["other extension"])


def test_folder_of_records(ranks: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "1.parquet", TEXTS[:20])
    write_jsonl(tmp_path / "in" / "0.jsonl", TEXTS[20:])
    write(tmp_path / "in", tmp_path / "out", ranks, extensions=["jsonl", "parquet"])
    assert tokens_of(tmp_path / "out") == by_hand(TEXTS[20:] + TEXTS[:20])


def test_large_vocabulary_takes_four_bytes(ranks: str, tmp_path: Path) -> None:
    wide = tmp_path / "wide.model"
    wide.write_bytes(Path(ranks).read_bytes() + base64.b64encode(b"ab") + b" 70000\n")
    write(write_jsonl(tmp_path / "a.jsonl", ["xab"]), tmp_path / "out", str(wide))
    assert np.fromfile(tmp_path / "out" / "shard-00000.bin", "<u4").tolist() == [ord("x"), 70000, 70001]
    assert TokenShards(tmp_path / "out").max_token_id == 70001


def test_surrogates_from_json_become_replacement_characters(ranks: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    write(path, tmp_path / "out", ranks)
    assert tokens_of(tmp_path / "out") == by_hand(["a\ufffdb 😀"])


def test_trained_tokenizer_stays_with_the_data(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(source, output, "train:400")
    expected = train_tokenizer([text for text in TEXTS if text], vocab_size=400)
    shards = TokenShards(output)
    assert shards.tokenizer_info == expected.info()
    assert tokens_of(output) == [token for text in TEXTS for token in [*expected.encode(text), expected.eos_id]]


def test_training_reads_the_first_bytes(tmp_path: Path) -> None:
    # 7 bytes end inside the second 漢; "ab" and "zz" come too late to be merged.
    source = write_jsonl(tmp_path / "a.jsonl", ["xyxy", "漢漢", "abababab", "zzzz"])
    write(source, tmp_path / "out", "train:400", max_training_bytes=7 + 1)
    expected = train_tokenizer(["xyxy", "漢"], vocab_size=400)
    assert TokenShards(tmp_path / "out").tokenizer_info == expected.info()


def test_reading_ahead_is_bounded(ranks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 10)
    taken = count()

    def documents() -> Iterator[Document]:
        for _ in range(1000):
            next(taken)
            yield Document("default", "x" * 10, START, 0)

    encoded = encode.encode_documents(documents(), tokenizer=load_tokenizer(ranks), num_threads=2)
    next(encoded)
    assert next(taken) <= 6
    encoded.close()


# Data sources.


def sources_of(folder: Path) -> list[str]:
    """The source of every token, read without the package."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    return [shard["source"] for shard in shards for _ in range(shard["num_tokens"])]


@pytest.mark.parametrize("seed", range(4))
def test_every_token_knows_its_source(ranks: str, tmp_path: Path, seed: int) -> None:
    """A random mix of formats, repeated and unnamed sources, against lists built document by document."""
    random = np.random.default_rng(seed)
    inputs: list[str | Path] = []
    tokens: list[int] = []
    sources: list[str] = []
    sizes: list[int] = []
    shard_tokens, seq_len = int(random.integers(1, 300)), int(random.integers(1, 60))
    names = random.choice(["web", "code", "books-2.0", "default"], 8)
    for i, name in enumerate(names):
        texts = list(random.choice(TEXTS, int(random.integers(0, 7)) + (i == 0)))
        if random.integers(2):
            path = write_jsonl(tmp_path / f"{i}.jsonl", texts)
        else:
            path = write_folder(tmp_path / f"{i}", [*texts, "\0"])  # the last is binary, hence skipped
            (path / "00" / "empty.md").write_bytes(b"")
            texts.append("")
        # Without a name it is the default one, and that one may be named as well.
        unnamed = name == "default" and bool(random.integers(2))
        inputs.append(path if unnamed else f"{name}={path}")
        for text in texts:
            if sizes and sources[-1] == name and sizes[-1] < shard_tokens:
                sizes[-1] += len(by_hand([text]))
            else:
                sizes.append(len(by_hand([text])))
            tokens += by_hand([text])
            sources += [name] * len(by_hand([text]))
    output = tmp_path / "out"
    summary = write_dataset(inputs, output=output, tokenizer=ranks, shard_tokens=shard_tokens)
    assert (tokens_of(output), sources_of(output)) == (tokens, sources)
    dataset = TokenDataset(output, seq_len=seq_len)
    assert [shard.num_tokens for shard in dataset.shards.index.shards] == sizes
    assert list(summary.source_tokens.items()) == [(name, sources.count(name)) for name in dict.fromkeys(names)]
    names, starts = zip(*dataset.sources, strict=True)
    found = [names[number] for number in np.searchsorted(starts, range(len(dataset)), side="right") - 1]
    assert found == [sources[i * seq_len] for i in range(len(dataset))]


def test_neighbours_of_one_source_share_a_shard(ranks: str, tmp_path: Path) -> None:
    for name in "abcd":
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    inputs = [f"{source}={tmp_path}/{file}.jsonl" for source, file in zip("xxyx", "abcd", strict=True)]
    summary = write_dataset(inputs, output=tmp_path / "out", tokenizer=ranks)
    shards = [(shard.source, shard.num_tokens) for shard in TokenShards(tmp_path / "out").index.shards]
    assert shards == [("x", 4), ("y", 2), ("x", 2)]
    assert summary.source_tokens == {"x": 6, "y": 2}
    assert TokenDataset(tmp_path / "out", seq_len=1).sources == [("x", 0), ("y", 4), ("x", 6)]


def test_names_of_sources_change_no_token(ranks: str, tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[:9])
    fingerprints = set()
    for i, inputs in enumerate([[f"x={first}", f"y={second}"], [f"y={first}", second]]):
        fingerprints.add(write_dataset(inputs, output=tmp_path / f"{i}", tokenizer=ranks).fingerprint)
    assert len(fingerprints) == 1
    assert tokens_of(tmp_path / "0") == by_hand(TEXTS + TEXTS[:9])


def test_names_patterns_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "date=1/b.jsonl",
        "date=1/a.jsonl",
        "date=2/a.jsonl",
        "date=2/.hidden.jsonl",
        "date=2/deep/a.jsonl",
        "web=code",
        "code",
        "[x]",
        "x",  # what [x] would match as a pattern
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")

    def parsed(*inputs: str | Path) -> list[tuple[str, str]]:
        return [(source, str(path)) for source, path in parse_inputs(inputs)]

    assert parsed("web=date=1/a.jsonl", "web=date=2") == [("web", "date=1/a.jsonl"), ("web", "date=2")]
    # What exists is a path.
    assert parsed("date=1/a.jsonl", "web=code", "[x]") == [
        ("default", p) for p in ("date=1/a.jsonl", "web=code", "[x]")
    ]
    assert parsed("web=./code", "web=web=code", "w=[x]") == [("web", "code"), ("web", "web=code"), ("w", "[x]")]
    # A name has no slash.
    assert parsed("./web=nowhere", f"{tmp_path}/a=b") == [("default", "web=nowhere"), ("default", f"{tmp_path}/a=b")]
    assert parsed(Path("a=b"), Path("date=*")) == [("default", "a=b"), ("default", "date=*")]
    assert parsed("web=date=1/*.jsonl", "./date=*/a*") == [
        *(("web", f"date=1/{name}.jsonl") for name in "ab"),
        *(("default", f"date={i}/a.jsonl") for i in (1, 2)),
    ]
    assert parsed("w=**/a.jsonl") == [("w", f"date={path}/a.jsonl") for path in ("1", "2", "2/deep")]
    assert parsed("w=*.nothing", "no.jsonl") == [("w", "*.nothing"), ("default", "no.jsonl")]


def test_command_with_sources(ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1", "0"):
        write_jsonl(tmp_path / f"web-{name}.jsonl", ["ab" + name])
    write_jsonl(tmp_path / "code.jsonl", ["c"])
    write_jsonl(tmp_path / "empty.jsonl", [])
    inputs = [f"web={tmp_path}/web-*.jsonl", f"code={tmp_path}/code.jsonl", f"books={tmp_path}/empty.jsonl"]
    assert main([*inputs, "--output", str(tmp_path / "out"), "--tokenizer", ranks]) == 0
    assert tokens_of(tmp_path / "out") == by_hand(["ab0", "ab1", "c"])
    assert sources_of(tmp_path / "out") == ["web"] * 8 + ["code"] * 2
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ["  web: 8 tokens (80.0%)", "  code: 2 tokens (20.0%)", "  books: 0 tokens (0.0%)"]


# Documents and cursors.


def test_reading_continues_after_every_document(source: Path) -> None:
    files = list_files(parse_inputs([source, source]), extensions=["txt"])
    documents = list(read_documents(files, records=TEXT_RECORDS))
    assert [document.text for document in documents] == TEXTS * 2
    for i, document in enumerate(documents):
        rest = read_documents(files, records=TEXT_RECORDS, start=document.cursor)
        assert [(d.text, d.cursor) for d in rest] == [(d.text, d.cursor) for d in documents[i + 1 :]]


def test_the_bar_ends_at_the_size_of_the_inputs(source: Path) -> None:
    files = list_files(parse_inputs([source]), extensions=["txt"])
    num_bytes = sum(document.num_bytes for document in read_documents(files, records=TEXT_RECORDS))
    # A blank line at the end belongs to no document.
    assert 0 <= sum(file.num_bytes for file in files) - num_bytes <= 1


# Kill and resume.


class Crash(BaseException):
    """Not an Exception, so that nothing can handle it."""


@pytest.mark.parametrize(("after", "tokenizer"), [(False, "train:300"), (True, "file")])
def test_a_crash_at_any_file_is_resumed_to_the_same_bytes(
    source: Path, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool, tokenizer: str
) -> None:
    tokenizer = ranks if tokenizer == "file" else tokenizer
    options = {"tokenizer": tokenizer, "shard_tokens": 700 if tokenizer == ranks else 250}
    write(source, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    num_shards = sum(name.startswith("shard") and name.endswith(".bin") for name in expected)
    assert num_shards > 4
    rename, calls = os.replace, count()

    def crashing(source: Path, target: Path) -> None:
        crash = next(calls) == crash_at
        if crash and not after:
            raise Crash
        rename(source, target)
        if crash:
            raise Crash

    # Tokenizer, progress, then tokens, documents and progress of each shard, then the lengths and the index.
    for crash_at in range(2 + 3 * num_shards + 2):
        output = tmp_path / f"crash-{crash_at}"
        calls = count()
        monkeypatch.setattr(os, "replace", crashing)
        with pytest.raises(Crash):
            write(source, output, **options)
        monkeypatch.setattr(os, "replace", rename)
        if (output / "index.json").exists():
            with pytest.raises(ValueError, match="finished"):
                write(source, output, **options)
            (output / "progress.json").unlink()
        else:
            write(source, output, **options)
        assert contents(output) == expected
        shutil.rmtree(output)


def test_a_crash_among_sources_is_resumed_to_the_same_bytes(
    ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash at every document, with shards closed early by a source, and a source without any text."""
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", TEXTS[4 * i : 4 * i + 4]) for i in range(3)]
    binary = write_folder(tmp_path / "binary", ["\0", "\0"])
    named = [f"x={paths[0]}", f"x={binary}", f"z={binary}", f"x={paths[1]}", f"y={paths[2]}"]
    options = {"tokenizer": ranks, "shard_tokens": 100, "num_threads": 1}
    whole = write_dataset(named, output=tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert (whole.num_documents, whole.num_skipped) == (12, 4)
    shards = [(shard.source, shard.num_tokens) for shard in TokenShards(whole.path).index.shards]
    assert shards == [("x", 154), ("x", 179), ("x", 115), ("x", 13), ("y", 142), ("y", 82)]
    append, calls = writer.ShardWriter.append, count()

    def crashing(self: writer.ShardWriter, tokens: np.ndarray) -> None:
        if next(calls) == crash_at:
            raise Crash
        append(self, tokens)

    for crash_at in range(12):
        output, calls = tmp_path / f"crash-{crash_at}", count()
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(writer.ShardWriter, "append", crashing)
            write_dataset(named, output=output, **options)  # type: ignore[arg-type]
        summary = write_dataset(named, output=output, **options)  # type: ignore[arg-type]
        assert contents(output) == contents(tmp_path / "whole")
        assert (summary.num_skipped, summary.source_tokens) == (4, whole.source_tokens)


def test_sigkill_is_resumed_to_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} " * (i % 300) + "end" for i in range(1000)])
    output = tmp_path / "out"
    arguments = ["--tokenizer", "train:500", "--shard-tokens", "5000", "--max-training-bytes", "100000"]
    command = [str(source), "--output", str(output), *arguments]
    # `python -m titan_attent.data.text`, made slow enough to be killed in the middle on any machine.
    slow = """
import runpy, time
from titan_attent.data.text.format import ShardWriter
finish = ShardWriter.finish
ShardWriter.finish = lambda self: (time.sleep(0.05), finish(self))[1]
runpy.run_module("titan_attent.data.text", run_name="__main__")
"""
    process = subprocess.Popen([sys.executable, "-c", slow, *command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (output / "shard-00010.bin").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "index.json").exists()
    with pytest.raises(ValueError, match="interrupted; run the same"):
        TokenShards(output)
    kept = json.loads((output / "progress.json").read_text())["shards"]
    assert len(kept) >= 10
    written = {shard["file"]: (output / shard["file"]).stat().st_mtime_ns for shard in kept}

    assert main(command) == 0
    assert {name: (output / name).stat().st_mtime_ns for name in written} == written  # not written again
    assert main([str(source), "--output", str(tmp_path / "whole"), *arguments]) == 0
    assert contents(output) == contents(tmp_path / "whole")
    lines = capsys.readouterr().out.splitlines()
    shards = TokenShards(output)
    assert len(lines) == 2 and re.search(
        rf"out: 1,000 documents, {shards.num_tokens:,} tokens in {len(shards.index.shards):,} shards, [\d,]+ tokens/s$",
        lines[0],
    )


@pytest.fixture
def interrupted(ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An input, and the output of a run that was interrupted in its third shard."""
    source, output = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    append, calls = writer.ShardWriter.append, count()

    def crashing(self: writer.ShardWriter, tokens: np.ndarray) -> None:
        append(self, tokens)
        if next(calls) == 25:
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(writer.ShardWriter, "append", crashing)
        write(source, output, ranks, shard_tokens=700)
    shards = [f"shard-0000{i}.{kind}" for i in range(2) for kind in ("bin", "documents")]
    assert sorted(contents(output)) == ["progress.json", *shards, "tokenizer.tiktoken"]
    return source, output


def test_resume_needs_no_rank_file_nor_as_many_threads(
    interrupted: tuple[Path, Path], ranks: str, tmp_path: Path
) -> None:
    source, output = interrupted
    summary = write(source, output, ranks, shard_tokens=700, num_threads=9)
    write(source, tmp_path / "whole", ranks, shard_tokens=700)
    assert contents(output) == contents(tmp_path / "whole")
    assert summary.num_documents == len(TEXTS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_key": "body"}, ["text_key was 'text' and is 'body'"]),
        ({"shard_tokens": 701}, ["shard_tokens was 700 and is 701"]),
        ({"tokenizer": "train:300"}, ["tokenizer was", "bytes.model' and is 'train:300'"]),
    ],
)
def test_resume_with_other_arguments(
    interrupted: tuple[Path, Path], ranks: str, change: dict, words: list[str]
) -> None:
    source, output = interrupted
    before = contents(output)
    fixes = ("Use the same command", "delete the folder")
    refused({"shard_tokens": 700, "tokenizer": ranks, **change}, source, output, str(output), *words, *fixes)
    assert contents(output) == before


def test_resume_with_other_inputs(interrupted: tuple[Path, Path], ranks: str, tmp_path: Path) -> None:
    source, output = interrupted
    other = shutil.copy2(source, tmp_path / "b.jsonl")
    options = {"shard_tokens": 700, "tokenizer": ranks}
    words = (str(output), "inputs was '1 files", "Use the same command", "delete the folder")
    refused(options, Path(other), output, *words)
    # Even with the same path and time: the consumed records are compared.
    lines = source.read_bytes().split(b"\n")
    source.write_bytes(b"\n".join([lines[0].replace(b"document", b"Document"), *lines[1:]]))
    refused(options, source, output, *words)


def test_resume_with_other_sources(interrupted: tuple[Path, Path], ranks: str, tmp_path: Path) -> None:
    source, output = interrupted
    options = {"shard_tokens": 700, "tokenizer": ranks}
    before = contents(output)
    words = (str(output), "sources was None and is 'web: 1 files'", "Use the same command", "delete the folder")
    refused(options, f"web={source}", output, *words)
    assert contents(output) == before
    progress = json.loads(before["progress.json"])
    progress["arguments"]["sources"] = "web: 1 files"
    (output / "progress.json").write_text(json.dumps(progress))
    refused(options, source, output, "sources was 'web: 1 files' and is None")
    refused(options, f"code={source}", output, "sources was 'web: 1 files' and is 'code: 1 files'")


def test_resume_of_an_earlier_version_without_sources(
    interrupted: tuple[Path, Path], ranks: str, tmp_path: Path
) -> None:
    source, output = interrupted
    progress = json.loads((output / "progress.json").read_text())
    for shard in progress["shards"]:
        del shard["source"]
    (output / "progress.json").write_text(json.dumps(progress))
    write(source, output, ranks, shard_tokens=700)
    write(source, tmp_path / "whole", ranks, shard_tokens=700)
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damaged", [False, True])
def test_resume_of_an_earlier_version_without_documents(
    interrupted: tuple[Path, Path], ranks: str, tmp_path: Path, damaged: bool
) -> None:
    """The documents of its finished shards are found; a shard that does not end with an eos is refused."""
    source, output = interrupted
    progress = json.loads((output / "progress.json").read_text())
    for shard in progress["shards"]:
        for name in ("num_documents", "documents_sha256", "mask_sha256"):
            del shard[name]
        (output / shard["file"]).with_suffix(".documents").unlink()
    (output / "progress.json").write_text(json.dumps(progress))
    if damaged:
        path = output / "shard-00001.bin"
        path.write_bytes(path.read_bytes()[:-2] + b"\x05\x00")
        words = (f"{path}: its last token is 5, not the eos id 256", "write the data set anew")
        refused({"shard_tokens": 700, "tokenizer": ranks}, source, output, *words)
        return
    write(source, output, ranks, shard_tokens=700)
    write(source, tmp_path / "whole", ranks, shard_tokens=700)
    assert contents(output) == contents(tmp_path / "whole")


def test_resume_with_another_rank_file_of_the_same_name(
    interrupted: tuple[Path, Path], ranks: str, tmp_path: Path
) -> None:
    source, output = interrupted
    other_file = tmp_path / "bytes.model"
    other_file.write_bytes(Path(ranks).read_bytes() + base64.b64encode(b"ab") + b" 256\n")
    progress = json.loads((output / "progress.json").read_text())
    progress["arguments"]["tokenizer"] = str(other_file)
    (output / "progress.json").write_text(json.dumps(progress))
    refused(
        {"shard_tokens": 700, "tokenizer": str(other_file)},
        source,
        output,
        "tokenizer file was 'sha256",
        "delete the folder",
    )


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cursor": 3, "shards": []}'])
def test_resume_of_malformed_progress(interrupted: tuple[Path, Path], ranks: str, content: str) -> None:
    source, output = interrupted
    (output / "progress.json").write_text(content)
    options = {"shard_tokens": 700, "tokenizer": ranks}
    refused(options, source, output, str(output / "progress.json"), "malformed", "delete", "start anew")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ""])
def test_resume_reads_nothing_outside_of_the_folder(
    interrupted: tuple[Path, Path], ranks: str, tmp_path: Path, name: str
) -> None:
    source, output = interrupted
    (tmp_path / "secret").write_bytes((output / "shard-00000.bin").read_bytes())
    progress = json.loads((output / "progress.json").read_text())
    shards = [{**progress["shards"][0], "file": name}, *progress["shards"][1:]]
    for change in ({"tokenizer": {**progress["tokenizer"], "file": name}}, {"shards": shards}):
        (output / "progress.json").write_text(json.dumps(progress | change))
        words = ("malformed", f"{name!r} is not the name of a file in the folder", "delete", "start anew")
        refused({"shard_tokens": 700, "tokenizer": ranks}, source, output, str(output / "progress.json"), *words)


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00000.documents"])
@pytest.mark.parametrize("truncate", [True, False])
def test_resume_with_a_damaged_shard(interrupted: tuple[Path, Path], ranks: str, truncate: bool, name: str) -> None:
    source, output = interrupted
    shard = output / name
    shard.write_bytes(shard.read_bytes()[:-1]) if truncate else shard.unlink()
    options = {"shard_tokens": 700, "tokenizer": ranks}
    refused(options, source, output, str(shard), "missing or truncated", "delete", "start anew")


def test_a_mistake_before_the_first_shard_does_not_block_a_corrected_command(ranks: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS, key="body")
    refused({"tokenizer": ranks}, source, tmp_path / "out", "no key 'text'")
    write(source, tmp_path / "out", ranks, text_key="body")
    assert tokens_of(tmp_path / "out") == by_hand(TEXTS)


# Every mistake: one message that says what is wrong, where and how to fix it, and exit code 2.


def refused(options: dict, source: Path | str, output: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        write(source, output, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.fixture
def command_fails(ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def check(source: Path | str, *words: str, options: tuple[str, ...] = (), tokenizer: str = ranks) -> None:
        command = [str(source), "--output", str(tmp_path / "out"), "--tokenizer", tokenizer, *options]
        assert main(command) == 2
        output, errors = capsys.readouterr()
        message = errors.splitlines()[-1]
        assert message.startswith("error: ") and "Traceback" not in errors and not output
        for word in words:
            assert word in message, f"{word!r} is not in: {message}"
        assert not (tmp_path / "out" / "index.json").exists()

    return check


def test_missing_input(command_fails, tmp_path: Path) -> None:
    command_fails(tmp_path / "no.jsonl", str(tmp_path / "no.jsonl"), "no such file or folder", "correct the path")


@pytest.mark.parametrize("name", ["", "web pages", "wéb", "a:b"])
def test_bad_name_of_a_source(command_fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    words = (
        f"{name}=a.jsonl: {name!r} is not a valid name of a source",
        "letters, digits, '_', '.' and '-'",
        f"./{name}=a.jsonl",
    )
    command_fails(f"{name}=a.jsonl", *words)
    assert not folder_names.is_source_name("web\n")


def test_missing_path_of_a_source(command_fails, tmp_path: Path) -> None:
    command_fails("web=", "web=: no path", "NAME=PATH")
    command_fails(f"web={tmp_path}/*.jsonl", f"{tmp_path}/*.jsonl: no such file or folder", "correct the path")


@pytest.mark.parametrize("name", ["table.xlsx", "noextension"])
def test_unsupported_extension(command_fails, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    command_fails(tmp_path / name, str(tmp_path / name), "unsupported extension", "convert it to jsonl", "--extensions")


def test_the_fix_of_an_unsupported_extension_works(ranks: str, tmp_path: Path) -> None:
    (tmp_path / "table.XML").write_text("x")
    command = [str(tmp_path / "table.XML"), "--output", str(tmp_path / "out"), "--tokenizer", ranks]
    assert main([*command, "--extensions", " .xml,txt"]) == 0
    assert tokens_of(tmp_path / "out") == by_hand(["x"])


def test_folder_without_text(command_fails, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_text("x")
    command_fails(tmp_path / "in", str(tmp_path / "in"), "no file with extension txt, md", "--extensions")


def test_inputs_without_a_document(command_fails, ranks: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff")
    command_fails(tmp_path / "in", str(tmp_path / "in"), "no document", "1 files are binary or not UTF-8", "hold text")
    (tmp_path / "in" / "a.txt").write_bytes(b"text")
    write(tmp_path / "in", tmp_path / "out", ranks)


def test_skipped_files_are_counted(ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "in", ["a", "b\0", "c\0"])
    assert main([str(folder), "--output", str(tmp_path / "out"), "--tokenizer", ranks]) == 0
    assert "warning: skipped 2 files that are binary or not UTF-8" in capsys.readouterr().err


def test_text_file_that_is_not_utf8(command_fails, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    command_fails(tmp_path / "a.txt", str(tmp_path / "a.txt"), "not UTF-8", "position 2", "convert the file to UTF-8")


@pytest.mark.parametrize("line", [b"{", b'{"text": "\xff"}', b"[" * 100_000, b'{"text": "a"} {"text": "b"}'])
def test_malformed_json_line(command_fails, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    command_fails(path, f"{path}:3: malformed JSON line", "fix or remove the line")


def test_json_line_that_is_no_object(command_fails, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'["text"]\n')
    command_fails(path, f"{path}:1: a JSON list where an object with the key 'text' is expected", "one object per line")


def test_unknown_key(command_fails, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1, "content": "x"}\n')
    command_fails(path, f"{path}:1: no key 'text'", "--text-key, one of 'id', 'content'")
    parquet = write_parquet(tmp_path / "a.parquet", TEXTS)
    options = ("--text-key", "body")
    command_fails(parquet, f"{parquet}: no column 'body'", "--text-key, one of 'text', 'other'", options=options)


def test_text_that_is_no_string(command_fails, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": null}\n')
    command_fails(path, f"{path}:2: 'text' is NoneType, not a string", "fix or remove the record", "--text-key")
    parquet = write_parquet(tmp_path / "a.parquet", TEXTS)
    words = (f"{parquet}: row 1: 'other' is int, not a string", "another --text-key")
    command_fails(parquet, *words, options=("--text-key", "other"))


def test_damaged_parquet(command_fails, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    command_fails(path, str(path), "damaged or not a parquet file", "download or write it again")


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"plain", lambda data: data[:100] + b"?" * 50 + data[150:]],
)
def test_damaged_gzip(command_fails, tmp_path: Path, damage) -> None:
    path = write_gzip(tmp_path / "a.jsonl.gz", TEXTS)
    path.write_bytes(damage(path.read_bytes()))
    command_fails(path, str(path), "damaged gzip file after line", "download or compress it again")


@pytest.mark.parametrize("size", ["", "x", "-5", "4096.0"])
def test_malformed_vocabulary_size(command_fails, tmp_path: Path, size: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command_fails(source, f"train:{size}", "not a vocabulary size", "train:32768", tokenizer=f"train:{size}")


def test_other_tokenizer_mistakes(command_fails, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command_fails(source, "train:256", "257", tokenizer="train:256")
    command_fails(source, "'gpt-nine'", "neither a tiktoken encoding nor a file", tokenizer="gpt-nine")


@pytest.mark.parametrize("name", ["shard-tokens", "num-threads", "max-training-bytes"])
def test_counts_below_one(command_fails, tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command_fails(source, f"{name.replace('-', '_')} is 0", "1 or more", options=(f"--{name}", "0"))


def test_a_shard_that_could_exceed_32_bits(command_fails, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for shard_tokens, max_bytes in ((2**32 - 1, 2**28), (2**27, 2**32)):
        options = ("--shard-tokens", str(shard_tokens), "--max-document-bytes", str(max_bytes))
        words = (f"shard_tokens {shard_tokens} and max_document_bytes {max_bytes}", "above 4294967295", "lower them")
        command_fails(source, *words, options=options)


def test_finished_data_set_is_kept(ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command = [str(source), "--output", str(tmp_path / "out"), "--tokenizer", ranks]
    assert main(command) == 0
    before = contents(tmp_path / "out")
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for word in (str(tmp_path / "out"), "finished data set", "choose another --output", "delete it"):
        assert word in message
    assert contents(tmp_path / "out") == before


def test_output_inside_an_input(command_fails, ranks: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    command_fails(tmp_path, str(tmp_path / "out"), f"inside the input {tmp_path}", "--output outside")


def test_output_with_stray_shards(command_fails, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-00007.bin").write_bytes(b"precious")
    command_fails(source, str(tmp_path / "out"), "holds shard-00007.bin but no index.json", "--output", "delete")
    assert (tmp_path / "out" / "shard-00007.bin").read_bytes() == b"precious"


def test_output_that_is_a_file(command_fails, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").write_text("x")
    command_fails(source, str(tmp_path / "out"), "is a file", "choose a folder for --output")


def test_output_that_cannot_be_made(ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert main([str(source), "--output", str(source / "out"), "--tokenizer", ranks]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and str(source / "out") in message and "the same command resumes" in message


def test_a_second_writer_is_kept_out(command_fails, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        command_fails(source, str(tmp_path / "out"), "another writer", "wait for it", "another --output")
    finally:
        os.close(handle)


def test_interrupt_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_command, "write_dataset", interrupt)
    assert main(["a.jsonl", "--output", str(tmp_path / "out"), "--tokenizer", "gpt2"]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_the_former_name_of_the_command_still_works() -> None:
    assert (former.main, former.write_dataset) == (main, write_dataset)
