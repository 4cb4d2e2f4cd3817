"""The files of a data set that hold its documents: their ends, the mask of their labels, and their lengths.

    shard-00000.documents   uint32 little-endian [num_documents]: where each document of the shard ends, in tokens from
                            the start of the shard. An end is exclusive; the last one is the size of the shard.
    shard-00000.mask        one bit per token of the shard, the lowest bit of a byte first: whether the loss of the
                            token as a label counts. The file exists only if some labels do not count.
    lengths.bin             uint64 little-endian [n, 2], rising: a length of documents in tokens, their eos included,
                            and the number of documents of that length

A document lies in one shard, and has at least one token, its eos. So ends rise strictly, and n lengths need at least
``n * (n + 1) / 2`` tokens. The readers check these properties, as files may be of unknown origin.

Cost: 4 bytes per document; 1/8 byte per token with a mask. Counting lengths reads all ends, 4 bytes per document.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from titan_attent.data.io.atomic import publish, temporary_name
from titan_attent.data.io.files import HASH_BLOCK

END_DTYPE, LENGTH_DTYPE = np.dtype("<u4"), np.dtype("<u8")
MAX_SHARD_TOKENS = 2**32 - 1
"""Maximum number of tokens of a shard with documents: the largest end that the file can hold."""
LENGTHS_FILE = "lengths.bin"
MERGE_LENGTHS, MERGE_BLOCKS = 2**20, 2**10
"""Lengths and blocks of them that are collected before they are sorted: many small shards cost one sort."""
FIX = "copy the data set again, or write it anew with `python -m titan_attent.data.text`"


def documents_file(shard_file: str) -> str:
    """The name of the file with the ends of a shard's documents."""
    return shard_file.removesuffix(".bin") + ".documents"


def mask_file(shard_file: str) -> str:
    """The name of the file with the mask of a shard's labels."""
    return shard_file.removesuffix(".bin") + ".mask"


def mask_bytes(num_tokens: int) -> int:
    return -(-num_tokens // 8)


class HashedFile:
    """A file that is written under a temporary name and hashed; :meth:`finish` gives it its name."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(temporary_name(path), "wb", buffering=2**20)  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def write(self, data: memoryview | bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def finish(self) -> str:
        """Fsync the file and rename it to its final name. Returns its sha256 (hex)."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        publish(temporary_name(self.path), self.path)
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Remove the file, unless it is finished."""
        if not self._file.closed:
            self._file.close()
            temporary_name(self.path).unlink()


class MaskFile(HashedFile):
    """A mask that is written in parts of any length."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._rest = np.zeros(0, dtype=bool)

    def append(self, mask: np.ndarray) -> None:
        """Append bool [T]."""
        bits = np.concatenate([self._rest, mask])
        whole = len(bits) // 8 * 8
        self.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def finish(self) -> str:
        self.write(np.packbits(self._rest, bitorder="little").tobytes())
        return super().finish()


def check_ends(ends: np.ndarray, *, path: Path, start: int, num_documents: int, num_tokens: int) -> None:
    """ValueError if ``ends``, int64 [n], cannot be those of the documents from number ``start`` of a shard on.

    Args:
        path: the file, for the message.
        num_documents, num_tokens: of the shard.
    """
    if not len(ends):
        return
    stop = start + len(ends)
    # Every document before the first has at least one token, and so has every document after the last.
    rising = ends[0] > start and np.all(ends[1:] > ends[:-1]) and ends[-1] <= num_tokens - (num_documents - stop)
    if not rising or (stop == num_documents and ends[-1] != num_tokens):
        raise ValueError(
            f"{path}: the ends of the documents {start} to {stop - 1} do not rise to {num_tokens}, the tokens of the "
            f"shard: damaged or edited; {FIX}"
        )


def count_lengths(folder: Path, shards: Iterable[tuple[str, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of all documents, int64 [n] rising, and the number of documents of each, int64 [n].

    Args:
        shards: file name, number of tokens and number of documents of every shard.

    Raises:
        ValueError: the ends in a file do not fit its shard.
    """
    lengths, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    pending: list[np.ndarray] = []
    for name, num_tokens, num_documents in shards:
        path = folder / documents_file(name)
        for block in _blocks_of_lengths(path, num_tokens=num_tokens, num_documents=num_documents):
            pending.append(block)
            if sum(map(len, pending)) >= MERGE_LENGTHS or len(pending) >= MERGE_BLOCKS:
                lengths, counts = _merge(lengths, counts, np.concatenate(pending))
                pending.clear()
    return _merge(lengths, counts, np.concatenate(pending)) if pending else (lengths, counts)


def _merge(lengths: np.ndarray, counts: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    new_lengths, new_counts = np.unique(new, return_counts=True)
    merged, slots = np.unique(np.concatenate([lengths, new_lengths]), return_inverse=True)
    totals = np.zeros(len(merged), dtype=np.int64)
    np.add.at(totals, slots, np.concatenate([counts, new_counts]))
    return merged, totals


def _blocks_of_lengths(path: Path, *, num_tokens: int, num_documents: int) -> Iterator[np.ndarray]:
    start, previous = 0, 0
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            ends = np.frombuffer(block[: len(block) // 4 * 4], dtype=END_DTYPE).astype(np.int64)
            lengths = np.diff(ends, prepend=previous)
            if start + len(ends) <= num_documents and len(lengths) and lengths.min() > 0:
                check_ends(ends, path=path, start=start, num_documents=num_documents, num_tokens=num_tokens)
                start, previous = start + len(ends), int(ends[-1])
                yield lengths
                continue
            break
    if start != num_documents or path.stat().st_size != 4 * num_documents:
        raise ValueError(
            f"{path}: does not hold the rising ends of {num_documents} documents: damaged, truncated or replaced; {FIX}"
        )


def encode_lengths(lengths: np.ndarray, counts: np.ndarray) -> bytes:
    """The content of ``lengths.bin``."""
    return np.stack([lengths, counts], axis=1).astype(LENGTH_DTYPE).tobytes()


def max_lengths_bytes(num_tokens: int) -> int:
    """Maximum size of ``lengths.bin``: n different lengths need at least ``n * (n + 1) / 2`` tokens."""
    return 2 * LENGTH_DTYPE.itemsize * math.isqrt(2 * num_tokens)


def decode_lengths(content: bytes, *, path: Path, num_tokens: int, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """The lengths, int64 [n], and the number of documents of each, int64 [n]. ValueError if they do not add up.

    Args:
        path: the file, for the message.
        num_tokens, num_documents: of the data set.
    """
    if len(content) % (2 * LENGTH_DTYPE.itemsize) == 0:
        lengths, counts = np.frombuffer(content, dtype=LENGTH_DTYPE).reshape(-1, 2).T
        rising = len(lengths) > 0 and lengths[0] > 0 and np.all(lengths[1:] > lengths[:-1])
        # Checked before they are multiplied: no product exceeds 64 bits.
        if rising and lengths[-1] <= num_tokens and np.all((counts > 0) & (counts <= num_tokens // lengths)):
            lengths, counts = lengths.astype(np.int64), counts.astype(np.int64)
            if _sum(counts) == num_documents and _sum(lengths * counts) == num_tokens:
                return lengths, counts
    raise ValueError(
        f"{path}: is no histogram of the lengths of {num_documents} documents with {num_tokens} tokens: damaged or "
        f"replaced; {FIX}"
    )


def _sum(numbers: np.ndarray) -> int:
    """The sum in Python integers, which cannot overflow."""
    return sum(numbers.tolist())


def check_sha256(values: Sequence[str]) -> None:
    """ValueError if one of ``values`` is not a sha256 in hex."""
    for value in values:
        if len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise ValueError(f"sha256 {value[:80]!r} is not 64 hexadecimal digits")
