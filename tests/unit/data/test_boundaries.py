"""The command that adds documents: the same files as of a new data set, also after a kill; and what it refuses."""

import base64
import json
import os
import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.text import boundaries, eos_documents
from titan_attent.data.text.boundaries import add_documents, main
from titan_attent.data.text.format import ShardWriter, write_index
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.writer import write_dataset

EOS = 256
TEXTS = [f"document {i} " * (i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two sources and several shards, as the writer writes it."""
    folder = tmp_path_factory.mktemp("new")
    ranks = folder / "bytes.model"
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    for name, texts in (("a", TEXTS[:40]), ("b", TEXTS[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = [f"web={folder}/a.jsonl", f"code={folder}/b.jsonl"]
    write_dataset(inputs, output=folder / "set", tokenizer=str(ranks), shard_tokens=200)
    return folder / "set"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def downgraded(new: Path, folder: Path, *, version: int = 2) -> Path:
    """``new`` as an earlier version wrote it."""
    shutil.copytree(new, folder)
    for path in [*folder.glob("*.documents"), folder / "lengths.bin"]:
        path.unlink()
    index = json.loads((folder / "index.json").read_text())
    del index["lengths"]
    for shard in index["shards"]:
        del shard["num_documents"], shard["documents_sha256"]
        if version == 1:
            del shard["source"]
    (folder / "index.json").write_text(json.dumps({**index, "version": version}))
    return folder


@pytest.fixture
def old(new: Path, tmp_path: Path) -> Path:
    return downgraded(new, tmp_path / "old")


def test_an_upgrade_equals_a_new_data_set(new: Path, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = TokenShards(old)
    assert before.num_shards > 4 and not before.has_documents
    assert main([str(old)]) == 0
    assert capsys.readouterr().out == f"{old}: 60 documents in {before.num_shards} shards\n"
    assert contents(old) == contents(new)
    after = TokenShards(old)
    assert after.fingerprint == before.fingerprint
    # Again: nothing is left to do.
    changed = {path.name: path.stat().st_mtime_ns for path in old.iterdir()}
    assert main([str(old)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in old.iterdir()} == changed


def test_an_upgrade_of_version_1(new: Path, tmp_path: Path) -> None:
    old = downgraded(new, tmp_path / "old", version=1)
    add_documents(old)
    shards = TokenShards(old)
    assert shards.has_documents and {shard.source for shard in shards.index.shards} == {"default"}
    assert shards.documents_fingerprint == TokenShards(new).documents_fingerprint


@settings(deadline=None, max_examples=40)
@given(
    shards=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    block=st.integers(1, 9),
)
def test_documents_are_found_across_blocks(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], block: int
) -> None:
    """Shards given by the lengths of their documents, read in blocks that cut documents anywhere."""
    folder, info = tmp_path_factory.mktemp("blocks"), {"name": "none", "vocab_size": 257, "eos_id": EOS}
    entries = []
    for number, lengths in enumerate(shards):
        with ShardWriter(folder / f"shard-{number:05d}.bin", dtype=np.dtype("<u2")) as shard:
            for length in lengths:
                shard.append(np.array([7] * (length - 1) + [EOS]))
            entries.append(shard.finish())
    # The number of documents in an index that was written by hand may be wrong.
    write_index(folder, dtype=np.dtype("<u2"), shards=entries, num_documents=1, max_token_id=EOS, tokenizer=info)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eos_documents, "HASH_BLOCK", 2 * block)
        index = add_documents(folder)
    assert index.num_documents == sum(map(len, shards))
    opened = TokenShards(folder)
    for number, lengths in enumerate(shards):
        assert opened.document_ends(number, 0, len(lengths)).tolist() == np.cumsum(lengths).tolist()


class Crash(BaseException):
    """Not an Exception, so that nothing can handle it."""


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_file_is_resumed(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    replace, calls, hashed = os.replace, count(), []
    find = boundaries.find_documents
    num_shards = TokenShards(new).num_shards

    def crashing(source: Path, target: Path) -> None:
        crash = next(calls) == crash_at
        if crash and not after:
            raise Crash
        replace(source, target)
        if crash:
            raise Crash

    def counted(folder: Path, shard, **options):  # type: ignore[no-untyped-def]
        hashed.append(shard.file)
        return find(folder, shard, **options)

    monkeypatch.setattr(boundaries, "find_documents", counted)
    # Documents and state of every shard, then the lengths and the index.
    for crash_at in range(2 * num_shards + 2):
        old = downgraded(new, tmp_path / f"{crash_at}")
        calls = count()
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(os, "replace", crashing)
            add_documents(old)
        assert TokenShards(old).has_documents == (after and crash_at == 2 * num_shards + 1)
        hashed.clear()
        add_documents(old)
        num_finished = min(num_shards, (crash_at + after) // 2)  # not read again
        assert len(hashed) == num_shards - num_finished
        assert contents(old) == contents(new)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"fingerprint": 3}', b'{"fingerprint": "other", "shards": []}']
)
def test_a_state_of_unknown_origin_is_not_used(new: Path, old: Path, content: bytes) -> None:
    (old / boundaries.STATE_FILE).write_bytes(content)
    add_documents(old)
    assert contents(old) == contents(new)


@pytest.mark.parametrize("name", ["file", "num_tokens", "sha256", "source", "num_documents", "documents_sha256"])
def test_a_state_of_other_shards_is_not_used(new: Path, old: Path, name: str) -> None:
    index = json.loads((new / "index.json").read_text())
    values = {"file": "shard-00001.bin", "num_tokens": 3, "source": "x", "num_documents": 1, "documents_sha256": ""}
    first = {**index["shards"][0], name: values.get(name, "0" * 64)}
    shutil.copy2(new / "shard-00000.documents", old)
    state = {"fingerprint": index["fingerprint"], "shards": [first]}
    (old / boundaries.STATE_FILE).write_text(json.dumps(state))
    add_documents(old)
    assert contents(old) == contents(new)


@pytest.mark.parametrize("change", ["the fingerprint", "more shards"])
def test_a_state_of_another_data_set_is_not_used(new: Path, old: Path, change: str) -> None:
    """Equal tokens with another tokenizer have another fingerprint, and other documents."""
    index = json.loads((new / "index.json").read_text())
    for path in new.glob("*.documents"):
        shutil.copy2(path, old)
    shards = [{**shard, "documents_sha256": "0" * 64} for shard in index["shards"]]
    state = {"fingerprint": index["fingerprint"], "shards": shards}
    state |= {"fingerprint": "0" * 64} if change == "the fingerprint" else {"shards": [*shards, shards[0]]}
    (old / boundaries.STATE_FILE).write_text(json.dumps(state))
    add_documents(old)
    assert contents(old) == contents(new)


# What is refused: one message, and the data set stays as it was.


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    before = contents(folder)
    assert main([str(folder)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert contents(folder) == before


def test_a_document_that_crosses_shards(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = old / "shard-00002.bin"
    tokens = np.fromfile(last, "<u2")
    tokens[-1] = 5
    tokens.tofile(last)
    words = (
        f"{last}: its last token is 5, not the eos id 256",
        "continues in the next shard",
        "write the data set anew",
    )
    refused(old, capsys, *words)


def test_a_folder_that_cannot_be_written(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    refused(old, capsys, f"{old}: this folder is read-only", "make it writable, or copy the data set")


def test_damaged_tokens(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = old / "shard-00000.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    refused(old, capsys, f"{path}: its sha256 is", "the shard is damaged", "copy the data set again")


def test_a_shard_beyond_32_bits(old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eos_documents, "MAX_SHARD_TOKENS", 100)
    refused(old, capsys, "shard-00000.bin: has", "more than the 100 of a shard with documents", "anew")


def test_a_folder_without_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path, capsys, f"{tmp_path}: not a data set, no index.json in it")
