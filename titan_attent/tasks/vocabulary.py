"""The tokenizer of a task: one token per word.

It is an ordinary tokenizer of a data set (data/text/tokenizer.py), so that every command that decodes text shows rows
as text. Words are written with a space before each; the words' ids follow those of the 256 single bytes, without which
no text could be encoded, and eos comes last.
"""

from collections.abc import Sequence

import tiktoken

from titan_attent.data.text.tiktoken_tokenizer import TiktokenTokenizer

FIRST_WORD = 256
"""The id of word 0."""
SPLIT_PATTERN = r" ?[^ ]+| "


def tokenizer_of(name: str, words: Sequence[str]) -> TiktokenTokenizer:
    """The tokenizer of the task ``name``: word i has the id ``FIRST_WORD + i``."""
    ranks = {bytes([byte]): byte for byte in range(FIRST_WORD)}
    ranks |= {f" {word}".encode(): FIRST_WORD + i for i, word in enumerate(words)}
    return TiktokenTokenizer(tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}))
