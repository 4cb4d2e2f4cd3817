"""Checks that the data sets of one run (training, validation, trusted) were written with the same tokenizer.

It compares the kind, the hash of the ranks or of the tokenizer.json, split pattern, special tokens, vocabulary size and
eos id, but not the name of the tokenizer or of its file. So two vocabularies of one size with different merges differ.
If an index has no hash of the ranks (written by hand), the names of the tokenizers, the vocabulary sizes and the eos
ids are compared.

Cost: compares two small dictionaries of two indexes; no shard is read.
"""

from pathlib import Path
from typing import Any

from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tiktoken_tokenizer import SPLIT_PATTERN

NAMES = ("name", "file")
RANKS = "sha256"
TIKTOKEN = "tiktoken"
"""The kind of a tokenizer whose entry names none."""
WORDS = {"vocab_size": "vocabulary", "eos_id": "eos id"}


def tokenizer_differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """The differences of two ``tokenizer`` entries of an index, for a message; empty if ids have the same meaning."""
    kinds = [entry.get("kind", TIKTOKEN) for entry in (expected, actual)]
    if kinds[0] != kinds[1]:
        return [f"kind {kinds[1]} instead of {kinds[0]}"]
    words = WORDS | {RANKS: "ranks" if kinds[0] == TIKTOKEN else "sha256 of the file"}
    by_ranks = RANKS in expected and RANKS in actual
    keys = [key for key in {**expected, **actual} if key not in NAMES] if by_ranks else ["name", "vocab_size", "eos_id"]
    return [
        f"{words.get(key, key.replace('_', ' '))} {_short(actual.get(key))} instead of {_short(expected.get(key))}"
        for key in keys
        if expected.get(key) != actual.get(key)
    ]


def check_same_tokenizer(other: TokenShards, run_data: TokenShards, *, what: str) -> None:
    """Refuse a data set that was not written with the tokenizer of the run's data.

    Args:
        other: the validation data, or trusted text.
        run_data: the data set at ``data.path``.
        what: prefix that names ``other`` in the message, such as "--trusted "; "" if the caller adds one.

    Raises:
        ValueError: lists the differences, and the option that writes ``other`` with the run's tokenizer.
    """
    differing = tokenizer_differences(run_data.tokenizer_info, other.tokenizer_info)
    if differing:
        raise ValueError(
            f"{what}{other.path} was written with another tokenizer than the run's data, {run_data.path}: "
            f"{'; '.join(differing)}. Its ids mean other text; write it with the tokenizer of the run's data, "
            f"{_option(run_data)}"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _option(shards: TokenShards) -> str:
    info = shards.tokenizer_info
    # A rank file always gets SPLIT_PATTERN; another pattern means a named encoding.
    from_file = "file" in info and (info.get("pattern") == SPLIT_PATTERN or "kind" in info)
    return f"--tokenizer {Path(shards.path) / info['file'] if from_file else info['name']}"
