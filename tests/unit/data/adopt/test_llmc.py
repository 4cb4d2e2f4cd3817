"""llm.c's and modded-nanogpt's .bin, adopted and compared token by token."""

from pathlib import Path

import numpy as np
import pytest
from token_files import adopted, check, llmc, make_documents

from titan_attent.data.formats.llmc import open_files
from titan_attent.data.formats.token_file import Hints

BOS = 50256


def test_every_token_and_document(gpt2: Path, tmp_path: Path) -> None:
    documents = [make_documents(vocab_size=50000, first=BOS, seed=seed) for seed in (0, 1)]
    for number, one in enumerate(documents):
        llmc(tmp_path / f"fineweb_train_{number + 1:06d}.bin", one)
    summary = adopted(tmp_path, gpt2, shard_tokens=200)
    shards = check(tmp_path, [*documents[0], *documents[1]])
    assert (summary.formats, summary.num_cut) == ({"llm.c": 2}, 0)
    assert shards.tokenizer_info["eos_id"] == BOS and shards.dtype == np.uint16


def test_a_document_that_a_file_cuts_is_two(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(vocab_size=900, first=900, count=10)
    longest = int(np.argmax([len(one) for one in documents]))
    head, tail = documents[longest][:7], documents[longest][7:]
    llmc(tmp_path / "a_000001.bin", [*documents[:longest], head])
    llmc(tmp_path / "a_000002.bin", [tail, *documents[longest + 1 :]])
    summary = adopted(tmp_path, tokenizer, bos="900")
    check(tmp_path, [*documents[:longest], head, tail, *documents[longest + 1 :]])
    assert summary.num_cut == 1


def test_llama_3(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(first=900, vocab_size=900)
    llmc(tmp_path / "tiny_train.bin", documents, variant="llama-3")
    assert open_files(tmp_path / "tiny_train.bin", Hints())[0].bos_id == 128000
    adopted(tmp_path, tokenizer, bos="900")
    assert check(tmp_path, documents).dtype == np.uint32


def test_files_of_both_splits_are_refused_unless_named(tokenizer: Path, tmp_path: Path) -> None:
    documents = make_documents(vocab_size=900, first=900)
    llmc(tmp_path / "fineweb_val_000000.bin", documents[:5])
    llmc(tmp_path / "fineweb_train_000001.bin", documents[5:])
    with pytest.raises(ValueError, match=r"validation files \(fineweb_val_000000.bin, 1 in all\).*--include"):
        adopted(tmp_path, tokenizer, bos="900")
    for name, expected in (("train", documents[5:]), ("val", documents[:5])):
        adopted(tmp_path, tokenizer, bos="900", include=f"*{name}*", output=tmp_path / name)
        check(tmp_path / name, expected)


@pytest.mark.parametrize(
    ("slot", "value", "words"),
    [(0, 20240522, "evaluation examples"), (1, 2, "version 2"), (2, 99, "says 1222: truncated"), (2, -5, "truncated")],
)
def test_damage_is_one_clear_error(tokenizer: Path, tmp_path: Path, slot: int, value: int, words: str) -> None:
    path = tmp_path / "a.bin"
    llmc(path, make_documents(vocab_size=900, first=900))
    header = np.fromfile(path, dtype="<i4", count=256)
    header[slot] = value
    path.write_bytes(header.tobytes() + path.read_bytes()[1024:])
    with pytest.raises(ValueError, match=words):
        adopted(tmp_path, tokenizer, bos="900")
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"truncated|evaluation"):
        adopted(tmp_path, tokenizer, bos="900")


@pytest.mark.parametrize("first", [BOS, 900])
def test_a_small_vocabulary_is_refused(tokenizer: Path, tmp_path: Path, first: int) -> None:
    """Where no document begins with 50256, all of them would be one."""
    llmc(tmp_path / "a.bin", make_documents(vocab_size=900, first=first))
    with pytest.raises(
        ValueError, match=r"begins documents with the id 50256, and the tokenizer has 1001 ids; give the tokenizer"
    ):
        adopted(tmp_path, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
