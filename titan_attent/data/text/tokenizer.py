"""Tokenizers: tiktoken encodings by name, from a local rank file, or trained here, each with an eos.

A data set folder keeps its tokenizer, the ranks in ``tokenizer.tiktoken`` and the rest (split pattern,
special tokens) in index.json, so that it can be decoded without a network.

Text comes back exactly, except lone surrogates, which UTF-8 cannot hold: each becomes U+FFFD, as in
tiktoken. The text of a special token in a document is text like any other.

Cost: about 5 million tokens/s a thread, outside the interpreter lock, and 4 bytes a token.
Source: tiktoken (https://github.com/openai/tiktoken); the split pattern is that of Llama 3
(https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.folder import check_file_name
from titan_attent.data.text.bpe import format_ranks, parse_ranks, train_ranks
from titan_attent.data.text.format import WRITER

EOS = "<|endoftext|>"
RANKS_FILE = "tokenizer.tiktoken"
TRAIN = "train:"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""For rank files and training. It has no possessive quantifier (those of cl100k_base do), which tiktoken's
regex engine and the trainer's read differently."""

WHITESPACE_BLOCK = 100_000
"""In characters. tiktoken's patterns backtrack over whitespace and panic on runs of some 500,000."""


class Tokenizer:
    """A tiktoken encoding. An encoding without ``<|endoftext|>`` gets this token as its next id.

    Attributes:
        vocab_size: the largest id + 1, eos included.
        eos_id: the id that ends every document.
    """

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
        # Before tiktoken 0.11 a document could hold the text of a special token and be given the token.
        if self.eos_id in encoding.encode_to_numpy(EOS, disallowed_special=()):
            raise ValueError(
                f"tiktoken {tiktoken.__version__} reads special tokens out of documents; install tiktoken 0.13 or later"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without eos."""
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """The ids of ``text``, without eos: uint32 [T]."""
        # encode_ordinary would build a list of Python integers, which holds the interpreter lock.
        pieces = [
            self._encoding.encode_to_numpy(piece, disallowed_special=())
            for piece in _split_long_whitespace(well_formed(text))
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[np.ndarray]:
        """The ids of every text, in order, as ``encode_to_array``; on ``num_threads`` threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode_to_array, texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; a character that is cut at an end becomes U+FFFD.

        Raises:
            ValueError: an id that the tokenizer does not have.
        """
        try:
            return self._encoding.decode(np.asarray(ids, dtype=np.int64).tolist())
        except (KeyError, OverflowError) as error:
            raise ValueError(
                f"tokenizer {self._encoding.name!r} has no token for an id ({error}), its ids are "
                f"below {self.vocab_size}; decode with the tokenizer that encoded the text"
            ) from error

    def info(self, file: str = RANKS_FILE) -> dict[str, Any]:
        """All that defines the tokenizer, for index.json; the ranks by name and hash of ``file``."""
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
        """Write ``tokenizer.tiktoken`` into ``folder``, atomically."""
        ranks = format_ranks(self._encoding._mergeable_ranks)
        write_atomically(Path(folder) / RANKS_FILE, ranks)

    @classmethod
    def from_info(cls, info: dict[str, Any], folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that wrote the data set in ``folder``, whose index holds ``info``.

        Raises:
            ValueError: the index names no rank file, or the file is missing or changed.
        """
        if "file" not in info:
            raise ValueError(
                f"{folder}: its index names no tokenizer file, so that its tokens have no text; write "
                f"the data set with {WRITER}, which keeps the tokenizer"
            )
        check_file_name(info["file"], of=f"{folder}: its tokenizer file")
        path = Path(folder) / info["file"]
        mend = "copy it again from where the data set was written"
        if not path.is_file():
            raise ValueError(f"{path}: this tokenizer file of the data set is missing; {mend}")
        content = path.read_bytes()
        if (actual := hashlib.sha256(content).hexdigest()) != info["sha256"]:
            raise ValueError(
                f"{path}: its sha256 is {actual} where the index says {info['sha256']}: not the "
                f"tokenizer that wrote the data set; {mend}"
            )
        encoding = tiktoken.Encoding(
            info["name"],
            pat_str=info["pattern"],
            mergeable_ranks=parse_ranks(content, path=path),
            special_tokens=info["special_tokens"],
        )
        return cls(encoding)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer called ``spec``.

    Args:
        spec: the name of a tiktoken encoding (``o200k_base``), which tiktoken downloads once, or the path
            of a rank file (``./tokenizer.model`` of Llama 3), which gets ``SPLIT_PATTERN``.

    Raises:
        ValueError: no such name or file, no network, or a malformed file.
    """
    names = tiktoken.list_encoding_names()
    if spec in names:
        return Tokenizer(_get_encoding(spec))
    path = Path(spec)
    if not path.is_file():
        raise ValueError(
            f"tokenizer {spec!r}: neither a tiktoken encoding nor a file; use one of "
            f"{', '.join(names)}, the path of a tiktoken rank file, or, when writing a data set, "
            "train:VOCAB_SIZE"
        )
    return Tokenizer(_encoding(path.stem, parse_ranks(path.read_bytes(), path=path)))


def make_tokenizer(spec: str, *, texts: Iterable[str], max_training_bytes: int) -> Tokenizer:
    """As :func:`load_tokenizer`, or for ``train:VOCAB_SIZE`` one trained on the first bytes of ``texts`` (of
    sample.py)."""
    if not spec.startswith(TRAIN):
        return load_tokenizer(spec)
    vocab_size = spec.removeprefix(TRAIN)
    if not vocab_size.isdecimal():
        raise ValueError(f"tokenizer {spec!r}: {vocab_size!r} is not a vocabulary size; use for example train:32768")
    return train_tokenizer(_first_bytes(texts, num_bytes=max_training_bytes), vocab_size=int(vocab_size))


def _first_bytes(texts: Iterable[str], *, num_bytes: int) -> Iterator[str]:
    for text in texts:
        content = well_formed(text).encode("utf-8")[:num_bytes]
        yield content.decode("utf-8", "ignore")
        num_bytes -= len(content)
        if num_bytes == 0:
            return


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE learned from ``texts``: bytes 0 to 255, the merges in order, then eos.

    The same texts in the same order give the same tokenizer.

    Args:
        texts: read once.
        vocab_size: the largest number of ids, eos included; little text gives fewer.

    Raises:
        ValueError: ``vocab_size`` is below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f"train:{vocab_size}: the 256 single bytes and {EOS} need a vocabulary of 257; ask for that or more"
        )
    pieces = (piece for text in texts for piece in _split_long_whitespace(well_formed(text)))
    ranks = train_ranks(pieces, num_ranks=vocab_size - 1, pattern=SPLIT_PATTERN)
    return Tokenizer(_encoding("trained", ranks))


def _encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _get_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a wrong hash a ValueError
        raise ValueError(
            f"tokenizer {name!r}: tiktoken could not download its rank file ({error}); set "
            "TIKTOKEN_CACHE_DIR to a folder that the same call has filled where there is a network, or "
            "use the path of a local rank file, or train:VOCAB_SIZE"
        ) from error


def well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _split_long_whitespace(text: str) -> Iterator[str]:
    """``text`` whole, as tiktoken would encode it, or cut after aligned blocks of only whitespace.

    A run of twice the block covers an aligned one, so that longer runs are always cut. Ordinary text costs
    a look at one or a few characters a block.
    """
    start = 0
    for stop in range(WHITESPACE_BLOCK, len(text), WHITESPACE_BLOCK):
        if text[stop - WHITESPACE_BLOCK : stop].isspace():
            yield text[start:stop]
            start = stop
    yield text[start:]
