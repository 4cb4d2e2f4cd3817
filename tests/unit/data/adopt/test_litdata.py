"""litdata's chunks of tokens, adopted and compared token by token."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from token_files import adopted, check, litdata, make_documents


@pytest.mark.parametrize(
    ("data_format", "dtype"),
    [
        ("no_header_tensor:16", "<i4"),
        ("no_header_tensor:18", "<i8"),
        ("no_header_tensor:20", "<u2"),
        ("no_header_numpy:5", "<u2"),
    ],
)
@pytest.mark.parametrize("shard_tokens", [2**27, 250])
def test_every_token_and_item(tokenizer: Path, tmp_path: Path, data_format: str, dtype: str, shard_tokens: int) -> None:
    documents = make_documents()
    chunks = [documents[:15], documents[15:16], documents[16:]]
    litdata(tmp_path / "data", chunks, data_format=data_format, dtype=dtype)
    summary = adopted(tmp_path / "data", tokenizer, output=tmp_path / "index", shard_tokens=shard_tokens)
    shards = check(tmp_path / "index", documents)
    assert summary.formats == {"litdata": 3} and shards.dtype == np.dtype(dtype)


def edit(folder: Path, *, part: str, **changes: object) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    target = index["config"] if part == "config" else index["chunks"][0]
    target |= changes
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("config", {"data_format": ["pickle"]}, "pickled items, whose reading runs code"),
        ("config", {"data_format": ["no_header_tensor:0"]}, "not token ids of TokensLoader"),
        ("config", {"data_format": ["no_header_tensor:16", "int"]}, "not token ids"),
        ("config", {"data_format": 7}, "not token ids"),
        ("config", {"item_loader": "PyTreeLoader"}, "of PyTreeLoader"),
        ("config", {"compression": "zstd"}, "compressed .zstd."),
        ("config", {"encryption": {"algorithm": "fernet"}}, "encrypted"),
        ("chunk", {"chunk_bytes": 7}, "but index.json says 7"),
        ("chunk", {"chunk_size": 39}, "has 40 items, but index.json says 39"),
        ("chunk", {"chunk_size": 2**50}, "too few for"),
        ("chunk", {"chunk_size": 0}, "too few for 0 items"),
        ("chunk", {"dim": 3}, "but index.json says 3"),
        ("chunk", {"filename": "/etc/passwd"}, "names no file of its folder"),
        ("chunk", {"filename": "gone.bin"}, "gone.bin: cannot be read"),
    ],
)
def test_a_damaged_index_is_one_clear_error(
    tokenizer: Path, tmp_path: Path, part: str, changes: dict[str, object], words: str
) -> None:
    litdata(tmp_path / "data", [make_documents()])
    edit(tmp_path / "data", part=part, **changes)
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("slot", "value", "words"),
    [
        (1, 5, "begins at byte 5"),
        (2, 2**32 - 1, "do not rise"),
        (2, 4 * 42 + 1, "do not rise"),
        (41, 4 * 42, "do not rise|end at"),
    ],
)
def test_damaged_offsets_are_one_clear_error(
    tokenizer: Path, tmp_path: Path, slot: int, value: int, words: str
) -> None:
    litdata(tmp_path / "data", [make_documents()])
    path = tmp_path / "data" / "chunk-0-0.bin"
    content = path.read_bytes()
    path.write_bytes(content[: 4 * slot] + struct.pack("<I", value) + content[4 * slot + 4 :])
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated"):
        adopted(tmp_path / "data", tokenizer, output=tmp_path / "index")
