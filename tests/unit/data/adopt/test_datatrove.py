"""datatrove's .ds with .ds.index and .ds.loss, adopted and compared token by token."""

import struct
from pathlib import Path

import numpy as np
import pytest
from token_files import adopted, check, datatrove, make_documents

EOS = 1000


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("shard_tokens", [2**27, 250])
def test_every_token_document_and_mask(tokenizer: Path, tmp_path: Path, dtype: str, shard_tokens: int) -> None:
    documents = make_documents(vocab_size=1001)  # with an eos inside, and none at the end
    mask = np.random.default_rng(4).random(sum(map(len, documents))) < 0.7
    half = sum(map(len, documents[:20]))
    datatrove(tmp_path / "00000_unshuffled.ds", documents[:20], dtype=dtype, mask=mask[:half])
    datatrove(tmp_path / "00001_unshuffled.ds", documents[20:], dtype=dtype, mask=mask[half:])
    summary = adopted(tmp_path, tokenizer, shard_tokens=shard_tokens)
    shards = check(tmp_path, documents, mask=mask)
    assert summary.formats == {"datatrove": 2} and shards.dtype == np.dtype(dtype)
    assert not summary.left_out


def test_a_mask_for_some_files_only(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(count=5)
    datatrove(tmp_path / "a.ds", documents)
    datatrove(tmp_path / "b.ds", documents, mask=np.ones(sum(map(len, documents)), dtype=bool))
    with pytest.raises(ValueError, match="a.ds: has no mask of labels, unlike other files"):
        adopted(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("ending", "content", "words"),
    [
        (".index", b"\0" * 7, "not 8 per document"),
        (".index", b"", "not 8 per document"),
        (".index", struct.pack("<3Q", 5, 3, 10), "do not rise to 10"),
        (".index", struct.pack("<3Q", 2**63, 3, 10), "do not rise to 10"),
        (".index", struct.pack("<2Q", 5, 11), "ends at token 11"),
        (".index", struct.pack("<2Q", 5, 2**63), "ends at token"),
        (".loss", b"\1" * 9, "not one per token of 10"),
        (".loss", b"\1" * 9 + b"\7", "holds the byte 7"),
        ("", b"\0" * 19, "has 19 bytes"),
    ],
)
def test_damage_is_one_clear_error(tokenizer: Path, tmp_path: Path, ending: str, content: bytes, words: str) -> None:
    datatrove(tmp_path / "a.ds", [np.arange(4), np.arange(6)], mask=np.ones(10, dtype=bool))
    (tmp_path / f"a.ds{ending}").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path, tokenizer)
    assert sorted(tmp_path.iterdir()) == before
