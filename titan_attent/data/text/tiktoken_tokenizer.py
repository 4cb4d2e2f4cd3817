"""The tokenizers of tiktoken: encodings by name, from a local rank file, or trained here, each with an eos token.

The folder of a data set keeps the ranks in ``tokenizer.tiktoken``, the split pattern and the special tokens in
index.json.

Decoding gives the exact text. Only lone surrogates, which UTF-8 cannot hold, become U+FFFD, as in tiktoken. The text of
a special token in a document is encoded as ordinary text.

Cost: about 5 million tokens/s per thread, without the interpreter lock, and 4 bytes per token.
Source: tiktoken (https://github.com/openai/tiktoken); the split pattern is that of Llama 3
(https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.text.any_tokenizer import Tokenizer, read_kept, well_formed
from titan_attent.data.text.bpe import format_ranks, parse_ranks, train_ranks

EOS = "<|endoftext|>"
RANKS_FILE = "tokenizer.tiktoken"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Split pattern for rank files and training. It has no possessive quantifiers (cl100k_base has some), because the regex
engines of tiktoken and of the trainer interpret them differently."""

WHITESPACE_BLOCK = 100_000
"""Characters per block of :func:`_split_long_whitespace`. tiktoken panics on runs of about 500,000 white spaces, since
its patterns backtrack."""


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding with an eos token. An encoding without ``<|endoftext|>`` gets it as the next id."""

    FILE = RANKS_FILE

    def __init__(self, encoding: tiktoken.Encoding):
        if EOS not in encoding._special_tokens:
            encoding = tiktoken.Encoding(
                encoding.name,
                pat_str=encoding._pat_str,
                mergeable_ranks=encoding._mergeable_ranks,
                special_tokens={**encoding._special_tokens, EOS: encoding.max_token_value + 1},
            )
        self._encoding = encoding
        self.eos_id: int = encoding.eot_token
        self.vocab_size: int = encoding.max_token_value + 1
        # Before 0.11, tiktoken encoded the text of a special token in a document as that token.
        if self.eos_id in encoding.encode_to_numpy(EOS, disallowed_special=()):
            raise ValueError(
                f"tiktoken {tiktoken.__version__} encodes the text of special tokens as tokens; install tiktoken 0.13 "
                "or later"
            )

    def encode_to_array(self, text: str) -> np.ndarray:
        # encode_ordinary would build a list of Python integers, which holds the interpreter lock.
        chunks = [
            self._encoding.encode_to_numpy(chunk, disallowed_special=())
            for chunk in _split_long_whitespace(well_formed(text))
        ]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def encode_markup(self, text: str) -> np.ndarray:
        special = {text for text, number in self._encoding._special_tokens.items() if number != self.eos_id}
        return self._encoding.encode_to_numpy(well_formed(text), allowed_special=special, disallowed_special=())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        try:
            return self._encoding.decode(np.asarray(ids, dtype=np.int64).tolist())
        except (KeyError, OverflowError) as error:
            raise ValueError(
                f"tokenizer {self._encoding.name!r} has no token for an id ({error}); its ids are "
                f"below {self.vocab_size}; decode with the tokenizer that encoded the text"
            ) from error

    def bytes_of(self, token_id: int) -> bytes | None:
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except KeyError:
            return None

    def info(self, file: str = RANKS_FILE) -> dict[str, Any]:
        """The definition of the tokenizer for index.json; the ranks are given by the name and hash of ``file``."""
        return {
            "name": self._encoding.name,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "file": file,
            "sha256": hashlib.sha256(format_ranks(self._encoding._mergeable_ranks)).hexdigest(),
            "pattern": self._encoding._pat_str,
            "special_tokens": dict(self._encoding._special_tokens),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        ranks = format_ranks(self._encoding._mergeable_ranks)
        write_atomically(Path(folder) / RANKS_FILE, ranks)

    @classmethod
    def from_info(cls, info: dict[str, Any], folder: str | os.PathLike[str]) -> "TiktokenTokenizer":
        """The tokenizer that wrote the data set in ``folder``; ``info`` is from its index.

        Raises:
            ValueError: the index names no rank file, or the file is missing or changed.
        """
        path, content = read_kept(info, folder)
        encoding = tiktoken.Encoding(
            info["name"],
            pat_str=info["pattern"],
            mergeable_ranks=parse_ranks(content, path=path),
            special_tokens=info["special_tokens"],
        )
        tokenizer = cls(encoding)
        tokenizer.eos_id = info["eos_id"]  # adopted files may end their documents with another id
        return tokenizer


def load_ranks(path: Path) -> TiktokenTokenizer:
    """The tokenizer of a rank file, with ``SPLIT_PATTERN``; ValueError if it is malformed."""
    return TiktokenTokenizer(_encoding(path.stem, parse_ranks(path.read_bytes(), path=path)))


def load_named(name: str) -> TiktokenTokenizer:
    """The tiktoken encoding ``name``; ValueError if its download fails."""
    return TiktokenTokenizer(_get_encoding(name))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, progress: bool = False) -> TiktokenTokenizer:
    """Train a byte-level BPE on ``texts``. Its ids are the bytes 0 to 255, the merges in order, then eos.

    The same texts in the same order give the same tokenizer.

    Args:
        texts: the training texts, iterated once.
        vocab_size: the maximum number of ids, eos included; little text gives fewer.
        progress: show the bars of the trainer, on a terminal.

    Raises:
        ValueError: ``vocab_size`` is below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f"train:{vocab_size}: the 256 single bytes and {EOS} need a vocabulary of 257; give 257 or more"
        )
    chunks = (chunk for text in texts for chunk in _split_long_whitespace(well_formed(text)))
    ranks = train_ranks(chunks, num_ranks=vocab_size - 1, pattern=SPLIT_PATTERN, progress=progress)
    return TiktokenTokenizer(_encoding("trained", ranks))


def _encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _get_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # errors of requests are OSErrors; a wrong hash is a ValueError
        raise ValueError(
            f"tokenizer {name!r}: tiktoken could not download its rank file ({error}); set "
            "TIKTOKEN_CACHE_DIR to a folder that the same call has filled on a machine with a network, or "
            "use the path of a local rank file, or train:VOCAB_SIZE"
        ) from error


def _split_long_whitespace(text: str) -> Iterator[str]:
    """Yield ``text`` in chunks: cut after every aligned block that is only whitespace, else whole.

    A run of at least two blocks contains an aligned block, so longer runs are always cut. In other text, one or a few
    characters per block are checked.
    """
    start = 0
    for stop in range(WHITESPACE_BLOCK, len(text), WHITESPACE_BLOCK):
        if text[stop - WHITESPACE_BLOCK : stop].isspace():
            yield text[start:stop]
            start = stop
    yield text[start:]
