"""Tokenizers: tiktoken encodings by name, from a local rank file, or trained here, each with an eos token.

The folder of a data set keeps its tokenizer, so that the data can be decoded without a network: the ranks are in
``tokenizer.tiktoken``, the split pattern and the special tokens in index.json.

Decoding gives the exact text. Only lone surrogates, which UTF-8 cannot hold, become U+FFFD, as in tiktoken. The text of
a special token in a document is encoded as ordinary text.

Cost: about 5 million tokens/s per thread, without the interpreter lock, and 4 bytes per token.
Source: tiktoken (https://github.com/openai/tiktoken); the split pattern is that of Llama 3
(https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
"""Split pattern for rank files and training. It has no possessive quantifiers (cl100k_base has some), because the regex
engines of tiktoken and of the trainer interpret them differently."""

WHITESPACE_BLOCK = 100_000
"""Characters per block of :func:`_split_long_whitespace`. tiktoken panics on runs of about 500,000 white spaces, since
its patterns backtrack."""


class Tokenizer:
    """A tiktoken encoding with an eos token. An encoding without ``<|endoftext|>`` gets it as the next id.

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
        # Before 0.11, tiktoken encoded the text of a special token in a document as that token.
        if self.eos_id in encoding.encode_to_numpy(EOS, disallowed_special=()):
            raise ValueError(
                f"tiktoken {tiktoken.__version__} encodes the text of special tokens as tokens; install tiktoken 0.13 "
                "or later"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without eos."""
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """The ids of ``text``, without eos: uint32 [T]."""
        # encode_ordinary would build a list of Python integers, which holds the interpreter lock.
        chunks = [
            self._encoding.encode_to_numpy(chunk, disallowed_special=())
            for chunk in _split_long_whitespace(well_formed(text))
        ]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def encode_markup(self, text: str) -> np.ndarray:
        """As :meth:`encode_to_array`, but the text of a special token other than eos becomes that token."""
        special = self._encoding._special_tokens.keys() - {EOS}
        return self._encoding.encode_to_numpy(well_formed(text), allowed_special=special, disallowed_special=())

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[np.ndarray]:
        """The ids of every text as from ``encode_to_array``, in order, computed on ``num_threads`` threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode_to_array, texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; a character cut off at either end becomes U+FFFD.

        Raises:
            ValueError: the tokenizer has no token for an id.
        """
        try:
            return self._encoding.decode(np.asarray(ids, dtype=np.int64).tolist())
        except (KeyError, OverflowError) as error:
            raise ValueError(
                f"tokenizer {self._encoding.name!r} has no token for an id ({error}); its ids are "
                f"below {self.vocab_size}; decode with the tokenizer that encoded the text"
            ) from error

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token, of a special token those of its text; None for an id without a token."""
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
        """Write ``tokenizer.tiktoken`` into ``folder`` atomically."""
        ranks = format_ranks(self._encoding._mergeable_ranks)
        write_atomically(Path(folder) / RANKS_FILE, ranks)

    @classmethod
    def from_info(cls, info: dict[str, Any], folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that wrote the data set in ``folder``; ``info`` is from its index.

        Raises:
            ValueError: the index names no rank file, or the file is missing or changed.
        """
        if "file" not in info:
            raise ValueError(
                f"{folder}: its index names no tokenizer file, so its tokens cannot be decoded; write "
                f"the data set with {WRITER}, which keeps the tokenizer"
            )
        check_file_name(info["file"], of=f"{folder}: its tokenizer file")
        path = Path(folder) / info["file"]
        fix = "copy it again from the original data set"
        if not path.is_file():
            raise ValueError(f"{path}: this tokenizer file of the data set is missing; {fix}")
        content = path.read_bytes()
        if (actual := hashlib.sha256(content).hexdigest()) != info["sha256"]:
            raise ValueError(
                f"{path}: its sha256 is {actual} but the index says {info['sha256']}: not the "
                f"tokenizer that wrote the data set; {fix}"
            )
        encoding = tiktoken.Encoding(
            info["name"],
            pat_str=info["pattern"],
            mergeable_ranks=parse_ranks(content, path=path),
            special_tokens=info["special_tokens"],
        )
        tokenizer = cls(encoding)
        tokenizer.eos_id = info["eos_id"]  # adopted files may end their documents with another id
        return tokenizer


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer ``spec``.

    Args:
        spec: the name of a tiktoken encoding (``o200k_base``), which tiktoken downloads once, or the path of a rank
            file (``./tokenizer.model`` of Llama 3), which is used with ``SPLIT_PATTERN``.

    Raises:
        ValueError: there is no such encoding or file, the download failed, or the file is malformed.
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


def make_tokenizer(
    spec: str, *, texts: Iterable[str], max_training_bytes: int, bar: Callable[[int], Any] | None = None
) -> Tokenizer:
    """As :func:`load_tokenizer`; for ``train:VOCAB_SIZE``, train one on the first bytes of ``texts`` (sample.py).

    Args:
        bar: called with the number of bytes of each text that is trained on. The merges are then shown by the trainer's
            own bars, on a terminal.
    """
    vocab_size = trained_size(spec)
    if vocab_size is None:
        return load_tokenizer(spec)
    first = _first_bytes(texts, num_bytes=max_training_bytes)
    return train_tokenizer(_counted(first, bar) if bar else first, vocab_size=vocab_size, progress=bar is not None)


def trained_size(spec: str) -> int | None:
    """The vocabulary size of ``train:VOCAB_SIZE``; None for another specification. ValueError if it is none."""
    if not spec.startswith(TRAIN):
        return None
    vocab_size = spec.removeprefix(TRAIN)
    if not vocab_size.isdecimal():
        raise ValueError(f"tokenizer {spec!r}: {vocab_size!r} is not a vocabulary size; use for example train:32768")
    return int(vocab_size)


def _counted(texts: Iterable[str], count: Callable[[int], Any]) -> Iterator[str]:
    for text in texts:
        yield text
        count(len(text.encode("utf-8")))


def _first_bytes(texts: Iterable[str], *, num_bytes: int) -> Iterator[str]:
    for text in texts:
        content = well_formed(text).encode("utf-8")[:num_bytes]
        yield content.decode("utf-8", "ignore")
        num_bytes -= len(content)
        if num_bytes == 0:
            return


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, progress: bool = False) -> Tokenizer:
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
    return Tokenizer(_encoding("trained", ranks))


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


def well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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
