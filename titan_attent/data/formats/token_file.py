"""What a format knows about one file of tokens, before any token is read.

Tokens stand in one contiguous run of bytes, or in segments (MosaicML's samples). Documents end where an index of the
format says, or are found by the ids that separate them. Blocks of numbers are read by position and checked against the
size of their file first, so that a damaged header costs no more memory than ``BLOCK_BYTES``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK_BYTES = 2**22
"""Bytes of an index that are read at once."""

INDEX, EOS, BOS, EOS_BOS, NONE = BOUNDARIES = ("index", "eos", "bos", "eos-bos", "none")
"""How documents are found: by the format's index, behind each eos id, before each bos id, between an eos and a bos id,
or not at all."""

TOKEN_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
}
"""The little-endian dtypes that tokens may have."""


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One file of tokens.

    Attributes:
        path: the file.
        dtype: of its tokens.
        num_tokens: number of its tokens.
        offset: the byte of the first token. Without ``segments`` the tokens are contiguous.
        boundaries: how its documents are found, one of ``BOUNDARIES``, if the user does not say.
        bos_id: the id before a document in this format, or None.
        ends: for documents of an index: yields int64 blocks of the ends of the documents in tokens, exclusive, falling
            nowhere; the last end is ``num_tokens``.
        segments: yields blocks (byte offsets, numbers of tokens), both int64 [n], of the segments in their order.
        mask: a file of one byte per token, 0 or 1: whether it counts as a label.
        note: why the boundaries are as they are, for the report.
    """

    path: Path
    dtype: np.dtype
    num_tokens: int
    offset: int = 0
    boundaries: str = EOS
    bos_id: int | None = None
    ends: Callable[[], Iterator[np.ndarray]] | None = None
    segments: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]] | None = None
    mask: Path | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What the user says about files whose headers do not.

    Attributes:
        dtype: dtype of raw tokens; None if it was not given.
        column: the column that holds the tokens.
        decompressed: folder for the decompressed copies of compressed files; None to refuse these.
        root: the folder to which their places in it are relative.
    """

    dtype: np.dtype | None = None
    column: str = "tokens"
    decompressed: Path | None = None
    root: Path | None = None


def bad(path: Path, problem: str, fix: str = "copy the file again, or write it anew with its own tool") -> ValueError:
    """The error about a file: what is wrong, and how to fix it."""
    return ValueError(f"{path}: {problem}; {fix}")


def file_size(path: Path) -> int:
    """Bytes of a file. ValueError if it is missing."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise bad(path, f"cannot be read ({error.strerror})", "correct the path, or copy the file again") from None


def read_head(path: Path, num_bytes: int) -> bytes:
    """The first ``num_bytes`` of a file, or all of a shorter one. ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise bad(path, f"cannot be read ({error.strerror})", "correct the path, or copy the file again") from None


def read_numbers(path: Path, dtype: np.dtype, *, offset: int, count: int) -> Iterator[np.ndarray]:
    """Yield ``count`` numbers from byte ``offset`` on, in blocks of ``BLOCK_BYTES``. ValueError if there are fewer."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while count:
            wanted = min(count, BLOCK_BYTES // dtype.itemsize)
            content = _read_exactly(file, wanted * dtype.itemsize)
            if len(content) < wanted * dtype.itemsize:
                raise bad(path, f"ends before byte {offset + count * dtype.itemsize}: it was truncated")
            yield np.frombuffer(content, dtype=dtype)
            offset, count = offset + len(content), count - wanted


def _read_exactly(file: object, size: int) -> bytes:
    parts, missing = [], size
    while missing and (part := file.read(missing)):  # type: ignore[attr-defined]
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def whole_tokens(path: Path, num_bytes: int, dtype: np.dtype) -> int:
    """The number of tokens in ``num_bytes`` of a file; ValueError if there are none, or part of one."""
    if num_bytes % dtype.itemsize or num_bytes <= 0:
        raise bad(
            path,
            f"{num_bytes} bytes of tokens are no multiple of the {dtype.itemsize} bytes of {dtype.name}"
            if num_bytes > 0
            else "has no tokens",
            "it is truncated, or has another dtype" if num_bytes > 0 else "leave it out with --include",
        )
    return num_bytes // dtype.itemsize
