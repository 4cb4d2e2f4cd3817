"""Adopting as a whole: where the index is, resuming, changed files, sources, refusals, and the command."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_files import adopted, check, llmc, make_documents, megatron, raw

from titan_attent.data.adopt import adopt as adopt_module
from titan_attent.data.adopt.__main__ import main
from titan_attent.data.adopt.adopt import adopt
from titan_attent.data.adopt.options import Options
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.format import ShardWriter, read_index, token_dtype, write_index
from titan_attent.data.text.holdout import hold_out_documents
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.data.text.writer import write_dataset

EOS = 1000


@pytest.fixture
def documents() -> list[np.ndarray]:
    return make_documents(last=EOS)


def test_an_adopted_file_and_our_own_shard_are_the_same_data(
    tokenizer: Path, tmp_path: Path, documents: list[np.ndarray]
) -> None:
    """Equal fingerprints, of tokens and of documents, and equal batches of windows and of documents."""
    (tmp_path / "files").mkdir()
    raw(tmp_path / "files" / "a.bin", documents)
    summary = adopted(tmp_path / "files", tokenizer, dtype="uint16")
    own = tmp_path / "own"
    own.mkdir()
    info = summary.index.tokenizer
    with ShardWriter(own / "shard-00000.bin", dtype=token_dtype(info["vocab_size"])) as writer:
        for document in documents:
            writer.append_document(document)
        entry = writer.finish()
    write_index(
        own,
        dtype=token_dtype(info["vocab_size"]),
        shards=[entry],
        num_documents=len(documents),
        max_token_id=writer.max_token_id,
        tokenizer=info,
    )
    ours, theirs = TokenShards(own), TokenShards(tmp_path / "files")
    assert ours.fingerprint == theirs.fingerprint and ours.documents_fingerprint == theirs.documents_fingerprint
    for kind in (TokenDataset, DocumentDataset):
        one, other = (kind(shards, seq_len=24) for shards in (ours, theirs))
        assert len(one) == len(other)
        ids = torch.randperm(len(one))[:20]
        (inputs, labels), (expected, expected_labels) = one.read(ids), other.read(ids)
        assert torch.equal(inputs["input"], expected["input"]) and torch.equal(labels, expected_labels)


def test_the_index_is_elsewhere_and_names_are_relative_to_the_root(
    tokenizer: Path, tmp_path: Path, documents: list[np.ndarray]
) -> None:
    files = tmp_path / "read_only" / "web"
    files.mkdir(parents=True)
    raw(files / "a.bin", documents)
    os.chmod(files, 0o500)
    before = sorted(tmp_path.rglob("*"))
    try:
        adopted(files, tokenizer, output=tmp_path / "index", root=tmp_path / "read_only", dtype="uint16")
    finally:
        os.chmod(files, 0o700)
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == sorted(
        tmp_path / "index" / name
        for name in ("", "adopted-00000.documents", "index.json", "lengths.bin", "tokenizer.tiktoken")
    )
    assert read_index(tmp_path / "index").shards[0].location == "web/a.bin"
    check(tmp_path / "index", documents)
    # Moved: one key of the index names the new root, and the fingerprint stays.
    fingerprint = TokenShards(tmp_path / "index").fingerprint
    (tmp_path / "read_only").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match='a.bin: this adopted file is missing.*set "root"'):
        TokenShards(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"root": "../moved"}))
    assert check(tmp_path / "index", documents).fingerprint == fingerprint


def test_a_relative_root_is_relative_to_the_index(
    tokenizer: Path, tmp_path: Path, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "raw").mkdir(parents=True)
    raw(tmp_path / "data" / "raw" / "a.bin", documents)
    monkeypatch.chdir(tmp_path)
    options = Options(dtype="uint16")
    adopt(["data/raw"], tokenizer=str(tokenizer), options=options, output="data/index", root="data/raw")
    (tmp_path / "data").rename(tmp_path / "other")
    assert read_index(tmp_path / "other" / "index").root == "../raw"
    check(tmp_path / "other" / "index", documents)


def test_sources(tokenizer: Path, tmp_path: Path) -> None:
    web, code = make_documents(seed=1), make_documents(seed=2)
    for name, one in (("web", web), ("code", code)):
        (tmp_path / name).mkdir()
        megatron(tmp_path / name / "a", one)
    adopt(
        [f"web={tmp_path}/web", f"code={tmp_path}/code"],
        tokenizer=str(tokenizer),
        output=str(tmp_path / "index"),
        root=str(tmp_path),
    )
    shards = check(tmp_path / "index", [*web, *code])
    sources = DocumentDataset(shards, seq_len=1000).sources
    assert sources == [("web", 0), ("code", sum(len(document) > 1 for document in web))]


def test_a_changed_file_is_noticed_and_adopted_again(
    tokenizer: Path, tmp_path: Path, documents: list[np.ndarray]
) -> None:
    for name in ("a", "b"):
        raw(tmp_path / f"{name}.bin", documents)
    fingerprint = adopted(tmp_path, tokenizer, dtype="uint16").index.fingerprint
    # A copy of the same tokens: only the time differs.
    os.utime(tmp_path / "b.bin", ns=(1, 1))
    with pytest.raises(ValueError, match="b.bin: has another time of change.*adopt the files again with the same"):
        TokenShards(tmp_path)
    summary = adopted(tmp_path, tokenizer, dtype="uint16")
    assert (summary.num_scanned, summary.index.fingerprint) == (1, fingerprint)
    check(tmp_path, [*documents, *documents])
    # Other tokens of the same size and time: only a hash finds them.
    stat, content = (tmp_path / "b.bin").stat(), (tmp_path / "b.bin").read_bytes()
    (tmp_path / "b.bin").write_bytes(content[:200] + b"\x01\x00" + content[202:])
    os.utime(tmp_path / "b.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="b.bin: its sha256 is"):
        TokenShards(tmp_path).verify_checksums()
    # Another size.
    raw(tmp_path / "b.bin", documents[:-1])
    with pytest.raises(ValueError, match=r"b.bin: has \d+ bytes than when it was adopted"):
        TokenShards(tmp_path)
    summary = adopted(tmp_path, tokenizer, dtype="uint16")
    assert summary.num_scanned == 1 and summary.index.fingerprint != fingerprint
    check(tmp_path, [*documents, *documents[:-1]])


def test_a_killed_command_resumes(
    tokenizer: Path, tmp_path: Path, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        raw(tmp_path / f"{number}.bin", documents)
    scanned: list[str] = []
    stock = adopt_module.scan

    def scan(file: Any, piece: Any, rule: Any, **options: Any) -> Any:
        if len(scanned) == 4:
            raise KeyboardInterrupt
        scanned.append(file.path.name)
        return stock(file, piece, rule, **options)

    monkeypatch.setattr(adopt_module, "scan", scan)
    options = Options(dtype="uint16", num_threads=1)
    with pytest.raises(KeyboardInterrupt):
        adopt([tmp_path], tokenizer=str(tokenizer), options=options)
    assert not (tmp_path / "index.json").exists() and (tmp_path / "adopting.jsonl").exists()
    with open(tmp_path / "adopting.jsonl", "a") as file:
        file.write('{"entry": {"file"')  # cut off by the crash
    os.utime(tmp_path / "1.bin", ns=(1, 1))  # changed in between
    monkeypatch.setattr(adopt_module, "scan", stock)
    summary = adopt([tmp_path], tokenizer=str(tokenizer), options=options)
    assert summary.num_scanned == 3 and not (tmp_path / "adopting.jsonl").exists()
    check(tmp_path, documents * 6)


def test_a_bad_file_keeps_what_is_finished(tokenizer: Path, tmp_path: Path, documents: list[np.ndarray]) -> None:
    for number in range(4):
        raw(tmp_path / f"{number}.bin", documents)
    raw(tmp_path / "9.bin", [np.array([1, 5000])])
    with pytest.raises(ValueError, match="9.bin: token 1 has the id 5000"):
        adopt([tmp_path], tokenizer=str(tokenizer), options=Options(dtype="uint16", num_threads=1))
    raw(tmp_path / "9.bin", documents)
    summary = adopted(tmp_path, tokenizer, dtype="uint16")
    assert 1 <= summary.num_scanned <= 2
    check(tmp_path, documents * 5)


def test_held_out_documents_of_an_adopted_set(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(count=400)
    megatron(tmp_path / "a", documents, dtype="<i4", code=4)
    adopted(tmp_path, tokenizer)
    train, held_out = tmp_path / "train", tmp_path / "held_out"
    train.mkdir(), held_out.mkdir()
    hold_out_documents(
        TokenShards(tmp_path), train=train, held_out=held_out, num_held_out=30, min_held_out=5, max_train_tokens=10**6
    )
    parts = [TokenShards(folder) for folder in (train, held_out)]
    assert sum(part.num_tokens for part in parts) == sum(map(len, documents))
    assert {part.dtype for part in parts} == {np.dtype("uint16")}


def test_an_adopted_set_is_pickled_and_its_tokenizer_decodes(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(last=999, vocab_size=900)
    raw(tmp_path / "a.bin", documents)
    adopted(tmp_path, tokenizer, dtype="uint16", eos="999")
    shards = pickle.loads(pickle.dumps(TokenShards(tmp_path)))
    np.testing.assert_array_equal(shards.read(0, 10), np.concatenate(documents)[:10])
    loaded = open_tokenizer(shards.tokenizer_info, tmp_path)
    assert loaded.eos_id == shards.tokenizer_info["eos_id"] == 999 and loaded.decode([65, 66]) == "AB"


def test_formats_and_dtypes_are_not_mixed(tokenizer: Path, tmp_path: Path, documents: list[np.ndarray]) -> None:
    raw(tmp_path / "train.npy", documents)
    np.save(tmp_path / "a.npy", np.concatenate(documents))
    with pytest.raises(ValueError, match="several formats, 1 numpy, 1 raw; choose one with --format"):
        adopted(tmp_path, tokenizer, dtype="uint16")
    (tmp_path / "train.npy").unlink()
    np.save(tmp_path / "b.npy", np.concatenate(documents).astype("<i4"))
    with pytest.raises(ValueError, match="b.npy: its tokens are int32, those of .*a.npy int64; a data set has one"):
        adopted(tmp_path, tokenizer)


@pytest.mark.parametrize("index", ['{"version": 2, "shards": []}', '{"chunks": [], "config": CONFIG}'])
def test_an_index_that_names_no_file_is_one_clear_error(tokenizer: Path, tmp_path: Path, index: str) -> None:
    """As writers leave behind that were not given a sample."""
    config = '{"data_format": ["no_header_tensor:16"], "item_loader": "TokensLoader"}'
    (tmp_path / "data").mkdir()
    (tmp_path / "data/index.json").write_text(index.replace("CONFIG", config))
    with pytest.raises(ValueError, match="index.json: names no file of tokens"):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_places_that_are_refused(tokenizer: Path, tmp_path: Path, documents: list[np.ndarray]) -> None:
    files = tmp_path / "files"
    files.mkdir()
    raw(files / "a.bin", documents)
    options = Options(dtype="uint16")

    def refused(words: str, *inputs: Path, **places: str) -> None:
        with pytest.raises(ValueError, match=words):
            adopt([*inputs], tokenizer=str(tokenizer), options=options, **places)

    refused("give both --output and --root", files, output=str(tmp_path / "x"))
    refused("several inputs, or a file", files / "a.bin")
    refused("several inputs, or a file", files / "*.bin")
    refused("gone: no such folder; correct the path", tmp_path / "gone")
    refused("no such folder", files, output=str(tmp_path / "x"), root=str(tmp_path / "other"))
    refused("no such file or folder", tmp_path / "gone", output=str(tmp_path / "x"), root=str(tmp_path))
    refused("is in several inputs", files, files / "a.bin", output=str(tmp_path / "x"), root=str(tmp_path))
    (tmp_path / "other").mkdir()
    refused("is not below --root", files, output=str(tmp_path / "x"), root=str(tmp_path / "other"))
    assert not (tmp_path / "x").exists()
    own = tmp_path / "own"
    (tmp_path / "text.txt").write_text("one text")
    write_dataset([tmp_path / "text.txt"], output=own, tokenizer=str(tokenizer))
    refused("is a data set that can be used as it is", files, output=str(own), root=str(tmp_path))
    (files / "lengths.bin").write_bytes(b"of somebody")
    refused("lengths.bin: has a name that adopting writes, and stays as it is", files)
    (files / "lengths.bin").unlink()
    # The writer does not overwrite what is adopted.
    adopt([files], tokenizer=str(tokenizer), options=options)
    with pytest.raises(ValueError, match="not that of a data set of text"):
        write_dataset([tmp_path / "text.txt"], output=files, tokenizer=str(tokenizer), overwrite=True)
    assert (files / "a.bin").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "../../etc/passwd"}, "not the path of a file below the root"),
        ({"path": "/etc/passwd"}, "not the path of a file below the root"),
        ({"path": ""}, "not the path of a file below the root"),
        ({"offset": -2}, "negative"),
        ({"offset": 2**62}, "too few for its tokens"),
        ({"num_bytes": 2}, "too few for its tokens"),
        ({"num_segments": 2**40, "segments_sha256": "0" * 64}, "segments of"),
        ({"num_segments": 3}, "segments of"),
        ({"mtime_ns": "soon"}, "mtime_ns"),
        ({"mtime_ns": 7}, "another time of change"),
    ],
)
def test_an_edited_view_is_refused(
    tokenizer: Path, tmp_path: Path, documents: list[np.ndarray], changes: dict[str, Any], words: str
) -> None:
    raw(tmp_path / "a.bin", documents)
    adopted(tmp_path, tokenizer, dtype="uint16")
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["view"] |= changes
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        TokenShards(tmp_path)


def test_the_command(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = make_documents(first=900, vocab_size=900)
    (tmp_path / "files").mkdir()
    llmc(tmp_path / "files" / "a_000001.bin", documents)
    (tmp_path / "files" / "README.md").write_text("of no interest")
    command = [str(tmp_path / "files"), "--tokenizer", str(tokenizer), "--bos", "900"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    tokens = sum(map(len, documents))
    assert f"{tokens:,} tokens of uint16 in 1 shards (1 scanned now); files: 1 llm.c" in printed
    assert "40 documents, found by: 1 bos" in printed and "1 of no format (first:" in printed
    assert main(command) == 0 and "(0 scanned now)" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "files")
    assert main(command) == 2 and "error: " in capsys.readouterr().err
