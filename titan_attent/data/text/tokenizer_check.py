"""Whether the ids of two token data sets mean the same text: training, validation and trusted data of one run.

The hash of the ranks, the split pattern, the special tokens, the vocabulary and the eos id decide it, not the name of
the tokenizer or of its file: two vocabularies of one size with other merges differ. An index that names no ranks
(written by hand) is compared by what it has, its tokenizer's name included.

Cost: compares two small dictionaries of two indexes; no shard is read.
"""

from pathlib import Path
from typing import Any

from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tokenizer import SPLIT_PATTERN

NAMES = ("name", "file")
RANKS = "sha256"
WORDS = {RANKS: "ranks", "vocab_size": "vocabulary", "eos_id": "eos id"}


def tokenizer_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What differs between two entries ``tokenizer`` of an index, in words; empty where ids mean the same."""
    by_ranks = RANKS in ours and RANKS in theirs
    keys = [key for key in {**ours, **theirs} if key not in NAMES] if by_ranks else ["name", "vocab_size", "eos_id"]
    return [
        f"{WORDS.get(key, key.replace('_', ' '))} {_short(theirs.get(key))} instead of {_short(ours.get(key))}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def check_same_tokenizer(theirs: TokenShards, ours: TokenShards, *, what: str) -> None:
    """Refuse data whose ids mean something else than those of the run's data.

    Args:
        theirs: of validation, or trusted text.
        ours: of ``data.path``.
        what: names ``theirs`` for the message, such as "--trusted "; "" where the caller does.

    Raises:
        ValueError: what differs, and how to write it with the run's tokenizer.
    """
    differing = tokenizer_differences(ours.tokenizer_info, theirs.tokenizer_info)
    if differing:
        raise ValueError(
            f"{what}{theirs.path} was written with another tokenizer than the run's data, {ours.path}: "
            f"{'; '.join(differing)}. Its ids mean something else; write it with the data's own, {_option(ours)}"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _option(shards: TokenShards) -> str:
    info = shards.tokenizer_info
    of_file = "file" in info and info.get("pattern") == SPLIT_PATTERN  # other patterns are those of a name
    return f"--tokenizer {Path(shards.path) / info['file'] if of_file else info['name']}"
