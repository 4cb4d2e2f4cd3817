"""Real NumPy files, written by numpy, adopted and compared token by token."""

from pathlib import Path

import numpy as np
import pytest
from token_files import adopted, check, make_documents

EOS = 1000


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", ">i4", "<i8", "<u8"])
def test_every_token_and_document(tokenizer: Path, tmp_path: Path, dtype: str) -> None:
    documents = make_documents(last=EOS)
    np.save(tmp_path / "train.npy", np.concatenate(documents).astype(dtype))
    summary = adopted(tmp_path, tokenizer, shard_tokens=300)
    shards = check(tmp_path, documents)
    assert summary.formats == {"numpy": 1} and shards.dtype == np.dtype(dtype)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_header(tokenizer: Path, tmp_path: Path, version: tuple[int, int]) -> None:
    documents = make_documents(last=EOS)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, np.concatenate(documents).astype("<u2"), version=version)
    adopted(tmp_path, tokenizer)
    check(tmp_path, documents)


def test_arrays_that_are_no_tokens(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array, words in (
        (np.zeros(4, dtype=np.float32), "dtype float32"),
        (np.zeros((2, 2), dtype=np.int32), r"shape \(2, 2\)"),
        (np.array([1, "a"], dtype=object), "pickled objects, whose reading runs code"),
        (np.zeros(0, dtype=np.uint16), "has no tokens"),
        (np.zeros(3, dtype="U2"), "dtype <U2"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError, match=words):
            adopted(tmp_path, tokenizer)


def test_damage_is_one_clear_error(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    content = path.read_bytes()
    for damaged, words in (
        (content[:-1], "has 327 bytes, but its header of 100 tokens says 328"),
        (content + b"\0", "has 329 bytes"),
        (content[:40], "cannot be read"),
        (content[:6] + b"\x09" + content[7:], "cannot be read"),
        (content.replace(b"(100,)", b"(1e9,)"), "cannot be read"),
        (content.replace(b"(100,)", b"(-99,)"), "header of -99 tokens"),
        (content.replace(b"descr", b"\0escr"), "cannot be read"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            adopted(tmp_path, tokenizer)
