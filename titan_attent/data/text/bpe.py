"""Byte-pair ranks, which define the vocabulary of a tiktoken encoding: reading, writing and training them.

A rank file holds one ``base64(token) rank`` per line. The rank of a token is its id, and ranks give the order in which
pairs are merged. The 256 single bytes are among the tokens, so that any text can be encoded.

Cost: training keeps the counts of the distinct pre-tokens of the texts in memory; it takes about 0.3 s on 1 MB of
English.
Source: byte-level BPE as in GPT-2 (https://openai.com/research/better-language-models), trained by
Hugging Face's tokenizers, exported to the format of tiktoken.
"""

import base64
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

MAX_PRE_TOKEN = 256
"""Maximum length of a pre-token in training, in characters: training time is quadratic in it, and a million spaces in a
row would take minutes."""


def format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """The content of a rank file, sorted by rank."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in in_order)


def parse_ranks(content: bytes, *, path: Path) -> dict[bytes, int]:
    """Token -> rank, from the content of a rank file.

    Raises:
        ValueError: a line is malformed or a duplicate, or a single byte has no token. The message names ``path`` and
            the line or byte.
    """
    fix = "use a tiktoken rank file, complete and unedited, with `base64(token) rank` per line"
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: malformed line {line[:80]!r}; {fix}") from error
        if not token or not 0 <= rank < 2**31:
            raise ValueError(f"{path}:{number}: token {token!r} with rank {rank}; {fix}")
        if token in ranks or rank in line_of_rank:
            first = line_of_rank[ranks.get(token, rank)]
            raise ValueError(f"{path}:{number}: token {token!r} or rank {rank} is a duplicate of line {first}; {fix}")
        ranks[token] = rank
        line_of_rank[rank] = number
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path}: has no token for {len(missing)} of the 256 single bytes, first for 0x{missing[0]:02x}, so that "
            f"some texts cannot be encoded; {fix}"
        )
    return ranks


def train_ranks(texts: Iterable[str], *, num_ranks: int, pattern: str, progress: bool = False) -> dict[bytes, int]:
    """Learn at most ``num_ranks`` (256 or more) tokens from ``texts``, split by ``pattern``.

    The single bytes come first, byte ``b`` with rank ``b``, then the merges in the order they were learned. A pair that
    occurs once is not merged, so that little text gives fewer tokens. The same texts give the same ranks. ``progress``
    shows the trainer's bars on a terminal.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_PRE_TOKEN}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # It prints empty lines where it shows no bar.
        show_progress=progress and sys.stdout.isatty() and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    byte_of = byte_of_character()
    ranks = {bytes([byte]): byte for byte in range(256)}
    for merge in json.loads(tokenizer.to_str())["model"]["merges"]:
        # A merge is "left right" in older versions of tokenizers, ["left", "right"] in newer ones.
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        # Two pairs may give the same token; tiktoken merges both, at the rank of the first.
        ranks.setdefault(bytes(byte_of[character] for character in left + right), len(ranks))
    return ranks


def byte_of_character() -> dict[str, int]:
    """The printable character for a byte in GPT-2's alphabet -> the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + i): byte for i, byte in enumerate(unprintable)}
    return {chr(byte): byte for byte in printable} | shifted
