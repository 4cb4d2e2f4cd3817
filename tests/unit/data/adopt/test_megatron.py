"""Megatron-core's .bin and .idx, adopted and compared token by token."""

import struct
from pathlib import Path

import numpy as np
import pytest
from token_files import adopted, check, make_documents, megatron, write_megatron_index

EOS = 1000


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i2", 3), ("<i8", 5)])
@pytest.mark.parametrize("sentences", [1, 3])
def test_every_token_and_document(tokenizer: Path, tmp_path: Path, dtype: str, code: int, sentences: int) -> None:
    # No eod: the boundaries are those of the index alone.
    documents = [make_documents(seed=seed) for seed in (0, 1)]
    for name, one in zip(("a", "b"), documents, strict=True):
        megatron(tmp_path / f"{name}_text_document", one, dtype=dtype, code=code, sentences=sentences)
    summary = adopted(tmp_path, tokenizer)
    shards = check(tmp_path, [*documents[0], *documents[1]])
    assert summary.formats == {"megatron": 2} and shards.dtype == np.dtype(dtype)
    assert shards.locate(0)[0] == "a_text_document.bin"


@pytest.mark.parametrize("shard_tokens", [1, 100, 333])
def test_large_files_are_several_shards(tokenizer: Path, tmp_path: Path, shard_tokens: int) -> None:
    documents = make_documents()
    megatron(tmp_path / "a", documents)
    adopted(tmp_path, tokenizer, shard_tokens=shard_tokens)
    shards = check(tmp_path, documents)
    sizes = [shard.num_tokens for shard in shards.index.shards]
    assert len(sizes) == len(documents) if shard_tokens == 1 else len(sizes) > 2
    assert min(sizes[:-1]) >= shard_tokens and max(sizes) < shard_tokens + 60
    assert shards.locate(sizes[0] + 5) == ("a.bin", sizes[0] + 5)


def test_documents_found_by_eos_are_the_same(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(last=EOS)
    megatron(tmp_path / "a", documents)
    by_index = adopted(tmp_path, tokenizer, shard_tokens=400).index
    for path in tmp_path.glob("*.json"):
        path.unlink()
    by_eos = adopted(tmp_path, tokenizer, shard_tokens=400, boundaries="eos").index
    check(tmp_path, documents)
    assert [shard.documents_sha256 for shard in by_index.shards] == [shard.documents_sha256 for shard in by_eos.shards]
    assert by_index.fingerprint == by_eos.fingerprint


def test_sequences_are_where_the_offsets_say(tokenizer: Path, tmp_path: Path) -> None:
    """Sequences in another order than their bytes, with gaps."""
    documents = make_documents(count=12)
    order = np.random.default_rng(3).permutation(12)
    content, offsets = b"\x00\x00" * 5, [0] * 12
    for number in order.tolist():
        offsets[number] = len(content)
        content += documents[number].astype("<u2").tobytes() + b"\x07\x00"
    (tmp_path / "a.bin").write_bytes(content)
    lengths = [len(document) for document in documents]
    write_megatron_index(tmp_path / "a.idx", lengths, offsets, [*range(13)], code=8)
    adopted(tmp_path, tokenizer)
    shards = check(tmp_path, documents)
    view = shards.index.shards[0].view
    assert view is not None and view.num_segments == 12


def test_documents_without_tokens_are_left_out(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(count=5)
    tokens = np.concatenate(documents).astype("<u2").tobytes()
    (tmp_path / "a.bin").write_bytes(tokens)
    lengths = [0, *(len(document) for document in documents), 0]
    offsets = (2 * (np.cumsum(lengths) - lengths)).tolist()
    write_megatron_index(tmp_path / "a.idx", lengths, offsets, [0, 1, 2, 2, 3, 4, 5, 6, 7], code=8)
    adopted(tmp_path, tokenizer)
    check(tmp_path, documents)


def test_a_whole_block_of_sequences_may_be_empty(tokenizer: Path, tmp_path: Path) -> None:
    """In a file whose sequences are not contiguous, whose tables are read in blocks of 2^18 sequences."""
    documents, empty = make_documents(count=2), 2**19
    second, first = (document.astype("<u2").tobytes() for document in reversed(documents))
    (tmp_path / "a.bin").write_bytes(second + first)
    lengths = [len(documents[0]), *[0] * empty, len(documents[1])]
    offsets = [len(second), *[0] * empty, 0]
    write_megatron_index(tmp_path / "a.idx", lengths, offsets, [*range(len(lengths) + 1)], code=8)
    adopted(tmp_path, tokenizer)
    check(tmp_path, documents)


def replaced(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("at", "new", "words"),
    [
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "float64"),
        (17, b"\x63", "code 99"),
        (17, b"\x04", "fewer than its sequences"),  # another width than the tokens
        (18, struct.pack("<Q", 2**63), "truncated"),
        (18, struct.pack("<Q", 39), "truncated"),
        (26, struct.pack("<Q", 2**60), "truncated"),
        (34, struct.pack("<i", -1), "negative"),
        (34, struct.pack("<i", 2**31 - 1), "fewer than its sequences"),
        (34 + 4 * 40, struct.pack("<q", -8), "fewer than its sequences"),
        (34 + 12 * 40, struct.pack("<q", 3), "do not rise from sequence 0"),
        (34 + 12 * 40 + 16, struct.pack("<q", 99), "do not rise"),
        (34 + 12 * 40 + 8 * 40, struct.pack("<q", 41), "end at sequence 41"),
        (0, b"TNTIDX\x00\x00", "TNTIDX"),
    ],
)
def test_damage_is_one_clear_error(tokenizer: Path, tmp_path: Path, at: int, new: bytes, words: str) -> None:
    megatron(tmp_path / "a", make_documents())
    path = tmp_path / "a.idx"
    path.write_bytes(replaced(path.read_bytes(), at, new))
    with pytest.raises(ValueError, match=words) as caught:
        adopted(tmp_path, tokenizer)
    assert str(tmp_path / "a.") in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_files_that_do_not_fit_each_other(tokenizer: Path, tmp_path: Path) -> None:
    megatron(tmp_path / "a", make_documents())
    tokens = (tmp_path / "a.bin").read_bytes()
    for content, words in ((tokens[:-2], "fewer than its sequences"), (tokens + b"\0\0", "grew")):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            adopted(tmp_path, tokenizer)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ValueError, match="a.bin: cannot be read"):
        adopted(tmp_path, tokenizer)
