"""What every tokenizer of a data set does, whichever library reads it (tokenizer.py says which there are)."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from titan_attent.data.io.folder import check_file_name
from titan_attent.data.text.format import WRITER


class Tokenizer(ABC):
    """Text -> token ids -> text, with an id that ends documents.

    Attributes:
        FILE: name of the file that keeps it in the folder of a data set.
        vocab_size: the largest id + 1, eos included.
        eos_id: the id that ends every document. No text is encoded to it.
    """

    FILE: ClassVar[str]
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without eos."""
        return self.encode_to_array(text).tolist()

    @abstractmethod
    def encode_to_array(self, text: str) -> np.ndarray:
        """The ids of ``text``, without eos: uint32 [T]. The text of a special token is ordinary text."""

    @abstractmethod
    def encode_markup(self, text: str) -> np.ndarray:
        """As :meth:`encode_to_array`, but the text of a special token other than eos becomes that token."""

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[np.ndarray]:
        """The ids of every text as from ``encode_to_array``, in order, computed on ``num_threads`` threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode_to_array, texts))

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; a character cut off at either end becomes U+FFFD.

        Raises:
            ValueError: the tokenizer has no token for an id.
        """

    @abstractmethod
    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token, of a special token those of its text; None for an id without a token.

        Raises:
            NoBytesError: a token of this tokenizer has no text of its own.
        """

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """The definition of the tokenizer for index.json, which names its file and the hash of it."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``FILE`` into ``folder`` atomically."""


class NoBytesError(ValueError):
    """The text of a token depends on its neighbours, so bits per byte cannot be computed."""


def well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_kept(info: dict[str, Any], folder: str | os.PathLike[str]) -> tuple[Path, bytes]:
    """The path and content of the tokenizer's file in the data set ``folder``; ``info`` is from its index.

    Raises:
        ValueError: the index names no file, or the file is missing or changed.
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
    return path, content


def special_id(value: str, *, option: str, tokenizer: dict[str, Any]) -> int:
    """The id of ``--eos`` or ``--bos``: a number, or the text of a special token.

    Args:
        tokenizer: its ``info``.

    Raises:
        ValueError: the tokenizer has no such special token, or the id is outside of its vocabulary.
    """
    special = tokenizer.get("special_tokens", {})
    if value in special:
        return int(special[value])
    if not value.isdecimal():
        raise ValueError(
            f"{option} {value}: is no id, and the tokenizer {tokenizer['name']!r} has no such special token; it has "
            f"{described(special)}"
        )
    if int(value) >= tokenizer["vocab_size"]:
        raise ValueError(
            f"{option} {value}: is outside of the {tokenizer['vocab_size']} ids of the tokenizer {tokenizer['name']!r}"
        )
    return int(value)


def described(special: dict[str, int], *, shown: int = 20) -> str:
    """The texts of the first special tokens, for a message."""
    more = f" and {len(special) - shown} more" if len(special) > shown else ""
    return (", ".join(list(special)[:shown]) or "none") + more
