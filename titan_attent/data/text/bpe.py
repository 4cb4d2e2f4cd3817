"""Byte-pair ranks, which are all that a tiktoken encoding knows: reading, writing and training them.

A rank file holds one ``base64(token) rank`` a line. The rank of a token is its id and the order in which
pairs are merged; the 256 single bytes are among the tokens, so that any text can be encoded.

Cost: training keeps the counts of the distinct pieces of the texts in memory; on 1 MB of English it takes
a third of a second.
Source: byte-level BPE as in GPT-2 (https://openai.com/research/better-language-models), trained by
Hugging Face's tokenizers, exported to the format of tiktoken.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

TRAINING_PIECE = 256
"""Longest piece to learn merges from, in characters: the trainer is quadratic in it, and a million
spaces in a row would take it minutes."""


def format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """The content of a rank file, in the order of the ranks."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in in_order)


def parse_ranks(content: bytes, *, path: Path) -> dict[bytes, int]:
    """Token -> rank of a rank file's content.

    Raises:
        ValueError: names ``path`` and the line that is malformed or a duplicate, or the byte that no
            token stands for.
    """
    mend = "use a tiktoken rank file, `base64(token) rank` a line, whole and unedited"
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: malformed line {line[:80]!r}; {mend}") from error
        if not token or not 0 <= rank < 2**31:
            raise ValueError(f"{path}:{number}: token {token!r} with rank {rank}; {mend}")
        if token in ranks or rank in line_of_rank:
            first = line_of_rank[ranks.get(token, rank)]
            raise ValueError(f"{path}:{number}: token {token!r} or rank {rank} is a duplicate of line {first}; {mend}")
        ranks[token] = rank
        line_of_rank[rank] = number
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path}: has no token for {len(missing)} of the 256 single bytes, the first of them "
            f"0x{missing[0]:02x}, so that not every text could be encoded; {mend}"
        )
    return ranks


def train_ranks(texts: Iterable[str], *, num_ranks: int, pattern: str) -> dict[bytes, int]:
    """Learn at most ``num_ranks`` (256 or more) tokens from ``texts``, split by ``pattern``.

    The single bytes come first, byte ``b`` with rank ``b``, then the merges in the order learned. A pair
    seen once is not merged, so that little text gives fewer tokens. The same texts give the same ranks.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{TRAINING_PIECE}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    byte_of = _byte_of_character()
    ranks = {bytes([byte]): byte for byte in range(256)}
    for merge in json.loads(tokenizer.to_str())["model"]["merges"]:
        # Older versions of tokenizers give "left right", newer ones ["left", "right"].
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        # Two pairs may make the same token; tiktoken merges both, at the rank of the first.
        ranks.setdefault(bytes(byte_of[character] for character in left + right), len(ranks))
    return ranks


def _byte_of_character() -> dict[str, int]:
    """The printable character that stands for a byte in GPT-2's alphabet -> the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
