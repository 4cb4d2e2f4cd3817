"""MosaicML MDS, adopted and compared token by token."""

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from token_files import adopted, check, make_documents, mds

from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenShards

EOS = 1000


@pytest.mark.parametrize("encoding", ["ndarray:int32", "ndarray:uint16", "ndarray", "bytes"])
@pytest.mark.parametrize("beside", [{}, {"a": "str", "z": "int"}, {"a": "int", "b": "str", "x": "str"}])
def test_samples_are_documents(tokenizer: Path, tmp_path: Path, encoding: str, beside: dict[str, str]) -> None:
    documents = make_documents(vocab_size=1001)
    documents[7] = np.arange(600)  # its shape takes two bytes
    mds(tmp_path / "data", [documents[:15], documents[15:]], encoding=encoding, beside=beside)
    summary = adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
    shards = check(tmp_path / "index", documents)
    assert summary.notes == ["samples are documents"] and not summary.left_out
    assert shards.dtype == {"ndarray:uint16": np.uint16, "ndarray:int32": np.int32}.get(encoding, np.int64)
    assert shards.locate(0) == ("shard.00000.mds", 0)


@pytest.mark.parametrize("encoding", ["ndarray:int32", "ndarray:int32:50", "bytes"])
def test_rows_of_joined_text_have_documents_by_eos(tokenizer: Path, tmp_path: Path, encoding: str) -> None:
    documents = make_documents(last=EOS, count=60)
    stream = np.concatenate(documents)
    rows = stream[: len(stream) // 50 * 50].reshape(-1, 50)
    half = len(rows) // 2
    mds(tmp_path / "data", [list(rows[:half]), list(rows[half:])], encoding=encoding)
    summary = adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
    # By hand: a document ends behind each eos, and where a shard ends.
    expected = []
    for part in (rows[:half].ravel(), rows[half:].ravel()):
        cuts = np.append(np.flatnonzero(part == EOS) + 1, len(part))
        expected += [one for one in np.split(part, cuts) if len(one)]
    check(tmp_path / "index", expected)
    assert summary.notes == ["all samples have 50 tokens: rows of joined text"]
    with pytest.raises(ValueError, match="adopted with other options"):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index", boundaries="index")
    adopted(tmp_path / "data", tokenizer, output=tmp_path / "samples", boundaries="index")
    check(tmp_path / "samples", list(rows))


def test_examples_cross_samples_and_shards(tokenizer: Path, tmp_path: Path) -> None:
    """Windows and packed documents of random spans, against the stream."""
    documents = make_documents(last=EOS, count=60)
    mds(tmp_path / "data", [documents[:20], documents[20:50], documents[50:]], beside={"a": "str"})
    adopted(tmp_path / "data", tokenizer, output=tmp_path / "index", boundaries="eos")
    shards, stream = TokenShards(tmp_path / "index"), np.concatenate(documents)
    generator = np.random.default_rng(0)
    for start, length in zip(
        generator.integers(0, 700, 50).tolist(), generator.integers(0, 400, 50).tolist(), strict=True
    ):
        np.testing.assert_array_equal(shards.read(start, start + length), stream[start : start + length])
    examples = DocumentDataset(shards, seq_len=16)
    for i in range(len(examples)):
        place = examples.location(i)
        start = sum(map(len, documents[: place["document"]]))
        inputs, labels = examples.read(torch.tensor([i]))
        document = documents[place["document"]]
        first = place["first_token"] - (start - start_of_file(shards, place["shard"]))
        length = place["num_tokens"] - 1
        np.testing.assert_array_equal(inputs["input"][0, :length].numpy(), document[first : first + length])
        np.testing.assert_array_equal(labels[0, :length].numpy(), document[first + 1 : first + length + 1])


def start_of_file(shards: TokenShards, name: str) -> int:
    starts = 0
    for shard in shards.index.shards:
        if shard.location == name:
            return starts
        starts += shard.num_tokens
    raise AssertionError(name)


def compress(folder: Path, codec: str, ending: str) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    for shard in index["shards"]:
        raw = folder / shard["raw_data"]["basename"]
        name = f"{raw.name}.{ending}"
        with pyarrow.CompressedOutputStream(str(folder / name), codec) as file:
            file.write(raw.read_bytes())
        raw.unlink()
        shard["compression"] = f"{ending}:7"
        shard["zip_data"] = {"basename": name, "bytes": (folder / name).stat().st_size, "hashes": {}}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(("codec", "ending"), [("zstd", "zstd"), ("gzip", "gz"), ("brotli", "br"), ("bz2", "bz2")])
def test_compressed_shards_are_decompressed_once(tokenizer: Path, tmp_path: Path, codec: str, ending: str) -> None:
    documents = make_documents()
    mds(tmp_path / "data", [documents[:15], documents[15:]])
    compress(tmp_path / "data", codec, ending)
    with pytest.raises(ValueError, match=f"compressed \\({ending}\\).*add --decompress DIR"):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
    where = {"output": tmp_path / "index", "root": tmp_path, "decompress": str(tmp_path / "plain")}
    adopted(tmp_path / "data", tokenizer, **where)
    check(tmp_path / "index", documents)
    copies = {path: path.stat().st_mtime_ns for path in (tmp_path / "plain").rglob("*.mds")}
    assert len(copies) == 2
    assert adopted(tmp_path / "data", tokenizer, **where).num_scanned == 0
    assert all(path.stat().st_mtime_ns == time for path, time in copies.items())


def test_a_compressed_shard_that_is_damaged(tokenizer: Path, tmp_path: Path) -> None:
    mds(tmp_path / "data", [make_documents()])
    compress(tmp_path / "data", "zstd", "zstd")
    path = tmp_path / "data" / "shard.00000.mds.zstd"
    content, index = path.read_bytes(), tmp_path / "data" / "index.json"
    where = {"output": tmp_path / "index", "root": tmp_path, "decompress": str(tmp_path / "plain")}
    for damaged, words in (
        (content[:-9], "fewer than|cannot be decompressed"),
        (b"no zstd" * 9, "cannot be decompressed"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            adopted(tmp_path / "data", tokenizer, **where)
    path.write_bytes(content)
    fields = json.loads(index.read_text())
    fields["shards"][0]["raw_data"]["bytes"] -= 1
    index.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="decompresses to more than"):
        adopted(tmp_path / "data", tokenizer, **where)
    assert not list((tmp_path / "plain").rglob("*.mds*"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0] |= changes
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"column_encodings": ["pkl"]}, "pickled .pkl., whose reading runs code"),
        ({"column_encodings": ["str"]}, "has the encoding str"),
        ({"column_encodings": ["ndarray:float32"]}, "encoding ndarray:float32"),
        ({"column_encodings": ["ndarray:int32:5,10"]}, "encoding ndarray:int32:5,10"),
        ({"column_encodings": ["ndarray:int64"]}, "other sizes|no whole number"),
        ({"column_names": ["text"]}, "has no column 'tokens', but text; name it with --column"),
        ({"column_names": []}, "without a name"),
        ({"column_sizes": [-4]}, "impossible size"),
        ({"column_sizes": [400]}, "larger than its place"),
        ({"format": "json"}, "is of format json"),
        ({"version": 3}, "version 3"),
        ({"samples": 39}, "has 40 samples, but its index says 39"),
        ({"samples": 2**40}, "too few for 1099511627776 samples"),
        ({"samples": 0}, "too few for 0 samples"),
        ({"samples": "many"}, "no count 'samples'"),
        ({"raw_data": {"basename": "../x", "bytes": 1}}, "names no file of its folder"),
        ({"raw_data": {"basename": "shard.00000.mds", "bytes": 1}}, "but index.json says 1"),
        ({"raw_data": None}, "is no object"),
    ],
)
def test_a_damaged_index_is_one_clear_error(
    tokenizer: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    mds(tmp_path / "data", [make_documents()])
    edit(tmp_path / "data", **changes)
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("at", "new", "words"),
    [
        (0, struct.pack("<I", 41), "has 41 samples"),
        (4, struct.pack("<I", 3), "do not rise to its end"),
        (8, struct.pack("<I", 2**32 - 1), "do not rise to its end"),
        (4 * 41, struct.pack("<I", 5), "do not rise to its end"),
        (None, struct.pack("<I", 2**31), "larger than its place"),
        (4, b"\x08", "more than one dimension"),
        (5, b"\xff", "other sizes than its shapes"),
    ],
)
def test_a_damaged_shard_is_one_clear_error(
    tokenizer: Path, tmp_path: Path, at: int | None, new: bytes, words: str
) -> None:
    mds(tmp_path / "data", [make_documents()])
    path = tmp_path / "data" / "shard.00000.mds"
    content = path.read_bytes()
    begin = struct.unpack_from("<I", content, 4)[0]
    # From the first sample on: its size, then the byte of its shape's dtype, then its shape.
    at = begin if at is None else begin + at if len(new) == 1 else at
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")


def test_the_index_of_mds_stays(tokenizer: Path, tmp_path: Path) -> None:
    mds(tmp_path, [make_documents()])
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(ValueError, match="is not an index of this package, and stays as it is; give --output DIR"):
        adopted(tmp_path, tokenizer)
    assert (tmp_path / "index.json").read_bytes() == before
