"""Bare tokens (nanoGPT, OLMo and Dolma with .csv.gz and label masks), adopted and compared token by token."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from token_files import adopted, check, make_documents, raw

EOS = 1000


@pytest.mark.parametrize("shard_tokens", [2**27, 250])
def test_nanogpt(tokenizer: Path, tmp_path: Path, shard_tokens: int) -> None:
    documents = make_documents(last=EOS)
    raw(tmp_path / "train.bin", documents)
    summary = adopted(tmp_path, tokenizer, dtype="uint16", shard_tokens=shard_tokens)
    check(tmp_path, documents)
    assert (summary.formats, summary.boundaries, summary.num_cut) == ({"raw": 1}, {"eos": 1}, 0)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
@pytest.mark.parametrize("shard_tokens", [2**27, 250])
def test_dolma(tokenizer: Path, tmp_path: Path, dtype: str, shard_tokens: int) -> None:
    """Documents by the .csv.gz: an eos inside of a document is no boundary, and a document may have none."""
    documents = make_documents(vocab_size=1001)
    for name, part in (("part-0-00000", documents[:9]), ("part-1-00000", documents[9:])):
        raw(tmp_path / f"{name}.npy", part, dtype=np.dtype(dtype).str, lines=True)
    mask = np.random.default_rng(5).random(sum(map(len, documents))) < 0.5
    (tmp_path / "masks").mkdir()
    for name, part in (("a", mask[: sum(map(len, documents[:9]))]), ("b", mask[sum(map(len, documents[:9])) :])):
        part.tofile(tmp_path / "masks" / f"{name}.bool")
    masks = str(tmp_path / "masks")
    summary = adopted(tmp_path, tokenizer, dtype=dtype, include="part*", label_masks=masks, shard_tokens=shard_tokens)
    shards = check(tmp_path, documents, mask=mask)
    assert summary.boundaries == {"index": 2} and shards.has_mask


def test_masks_that_do_not_fit(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(last=EOS)
    raw(tmp_path / "a.npy", documents)
    mask, num_tokens = tmp_path / "mask", sum(map(len, documents))
    for content, words in (
        (b"\1" * (num_tokens - 1), f"not one per token of .*a.npy \\({num_tokens}\\)"),
        (b"\1" * (num_tokens - 1) + b"\2", "holds the byte 2"),
    ):
        mask.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            adopted(tmp_path, tokenizer, dtype="uint16", include="a*", label_masks=str(mask))
    with pytest.raises(ValueError, match="2 files for 1 token files"):
        adopted(tmp_path, tokenizer, dtype="uint16", include="a*", label_masks=str(tmp_path))


@pytest.mark.parametrize("shard_tokens", [2**27, 1, 77])
def test_an_eos_without_a_bos_behind_it_is_inside_a_document(
    tokenizer: Path, tmp_path: Path, shard_tokens: int
) -> None:
    documents = make_documents(vocab_size=900, first=950, last=EOS)
    for document in documents[::3]:
        document[len(document) // 2 : len(document) // 2 + 1] = EOS  # no bos behind it
        document[0] = 950
    raw(tmp_path / "a.npy", documents)
    adopted(tmp_path, tokenizer, dtype="uint16", bos="950", shard_tokens=shard_tokens)
    check(tmp_path, documents)


@pytest.mark.parametrize("shard_tokens", [2**27, 1, 77])
def test_the_rest_without_an_eos_is_a_document(tokenizer: Path, tmp_path: Path, shard_tokens: int) -> None:
    documents = [*make_documents(last=EOS), np.array([1, 2, 3])]
    raw(tmp_path / "a.bin", documents)
    summary = adopted(tmp_path, tokenizer, dtype="uint16", shard_tokens=shard_tokens)
    check(tmp_path, documents)
    assert summary.num_cut == 1


def test_the_side_of_the_id_is_the_users(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(first=999, vocab_size=900)
    raw(tmp_path / "a.bin", documents)
    adopted(tmp_path, tokenizer, dtype="uint16", boundaries="bos", bos="999")
    check(tmp_path, documents)


def test_without_documents_there_are_windows(tokenizer: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 1001, 1000)
    raw(tmp_path / "a.bin", [tokens])
    index = adopted(tmp_path, tokenizer, dtype="uint16", boundaries="none", shard_tokens=300).index
    assert not index.has_documents and [shard.num_tokens for shard in index.shards] == [300, 300, 300, 100]
    from titan_attent.data.text.boundaries import add_documents
    from titan_attent.data.text.shards import TokenShards

    np.testing.assert_array_equal(TokenShards(tmp_path).read(0, 1000), tokens)
    with pytest.raises(ValueError, match="adopted without documents"):
        add_documents(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give --dtype uint8"),
        ({"dtype": "uint32"}, r"every|has the id \d+, but the tokenizer has 1001 ids"),
        ({"dtype": "uint8"}, "uint8, which cannot be the id 1000"),
        ({"dtype": "uint64"}, "no multiple of the 8 bytes"),
        ({"dtype": "uint16", "boundaries": "index"}, "has no index of documents"),
        ({"dtype": "uint16", "boundaries": "bos"}, "name it with --bos"),
        ({"dtype": "uint16", "eos": "<|end|>"}, r"no such special token; it has <\|endoftext\|>"),
        ({"dtype": "uint16", "eos": "1001"}, "outside of the 1001 ids"),
        ({"dtype": "uint16", "boundaries": "side"}, "--boundaries side: is unknown"),
        ({"dtype": "float32"}, "--dtype float32: is unknown"),
        ({"format": "tfrecord"}, "--format tfrecord: is unknown; use one of megatron"),
        ({"format": "megatron"}, "no token files found"),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    tokenizer: Path, tmp_path: Path, options: dict[str, str], words: str
) -> None:
    raw(tmp_path / "a.bin", [*make_documents(last=EOS, seed=2), np.array([7])])
    if sum(path.stat().st_size for path in tmp_path.iterdir()) % 8 == 0:
        raw(tmp_path / "a.bin", [*make_documents(last=EOS, seed=2), np.array([7, 8, 9])])
    if options.get("dtype") == "uint32":
        raw(tmp_path / "a.bin", [*make_documents(last=EOS, seed=2), np.array([7] * 100)][:-1])
        content = (tmp_path / "a.bin").read_bytes()
        (tmp_path / "a.bin").write_bytes(content[: len(content) // 4 * 4])
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path, tokenizer, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_wider_tokens_than_named(tokenizer: Path, tmp_path: Path) -> None:
    raw(tmp_path / "a.npy", make_documents(last=EOS), dtype="<u4")
    with pytest.raises(ValueError, match="every second token is 0.*try --dtype uint32"):
        adopted(tmp_path, tokenizer, dtype="uint16")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("0,5\n6,9\n", "line 2 is a document of tokens 6 to 9, after one to 5"),
        ("0,5\n5,3\n", "line 2 is a document of tokens 5 to 3"),
        ("0,5\n", "end at token 5 of 20"),
        ("0,99\n", "line 1 is a document of tokens 0 to 99"),
        ("0\n", "does not begin with start,end"),
        ("a,b\n", "does not begin with start,end"),
        (f"0,{'9' * 5000}\n", "does not begin with start,end"),
        ("", "end at token 0 of 20"),
    ],
)
def test_lines_that_do_not_fit(tokenizer: Path, tmp_path: Path, lines: str, words: str) -> None:
    raw(tmp_path / "a.npy", [np.arange(20)])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(lines.encode()))
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path, tokenizer, dtype="uint16")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"0,20\n")[:-6])
    with pytest.raises(ValueError, match="no whole gzip file"):
        adopted(tmp_path, tokenizer, dtype="uint16")
