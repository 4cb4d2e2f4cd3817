"""Megatron-core: tokens in NAME.bin, sequences and documents in NAME.idx.

    0       magic "MMIDIDX" and two zeros      9  uint64 version, 1       17  uint8 code of the dtype
    18      uint64 S, sequences                26 uint64 D, length of the array of documents
    34      int32 [S] tokens per sequence;     int64 [S] byte offsets of the sequences in the .bin;
            int64 [D] the sequence at which each document begins, and S at the end; perhaps int8 [S] modes

Documents are D - 1; an eod at the end of each is optional. Sequences are where the offsets say: contiguous in what
Megatron's own tools write, in segments otherwise.
Source: NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py.

Cost: one read of the .idx, in blocks.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titan_attent.data.formats.token_file import (
    INDEX,
    TOKEN_DTYPES,
    Hints,
    TokenFile,
    bad,
    file_size,
    read_head,
    read_numbers,
)

NAME, TITLE = "megatron", "Megatron-core .bin with .idx"
COMPANIONS = (".idx",)
MAGIC, OLD_MAGIC, VERSION, HEADER_BYTES = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00", 1, 34
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
LENGTH, OFFSET = np.dtype("<i4"), np.dtype("<i8")


def is_entry(path: Path) -> bool:
    """Whether ``path`` is an .idx of the format, also of its predecessor, which :func:`open_files` refuses."""
    return path.suffix == ".idx" and read_head(path, len(MAGIC)).startswith((MAGIC, OLD_MAGIC))


def open_files(path: Path, hints: Hints) -> list[TokenFile]:
    """The tokens of the .bin beside the .idx ``path``."""
    head = read_head(path, HEADER_BYTES)
    if head.startswith(OLD_MAGIC):
        raise bad(path, "is an index of fairseq's older format TNTIDX", "convert it with Megatron-LM's own tools")
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise bad(path, "does not begin with the header of Megatron's index: damaged or truncated")
    version, code, num_sequences, num_bounds = struct.unpack_from("<QBQQ", head, len(MAGIC))
    if version != VERSION:
        raise bad(path, f"is of version {version}, not {VERSION}", "convert it with a Megatron-LM that reads it")
    if DTYPES.get(code) not in TOKEN_DTYPES:
        raise bad(path, f"has the dtype {DTYPES.get(code, f'code {code}')}, which token ids do not have")
    # Python integers: a damaged count does not overflow.
    expected = HEADER_BYTES + 12 * num_sequences + 8 * num_bounds
    if (actual := file_size(path)) not in (expected, expected + num_sequences):
        raise bad(path, f"has {actual} bytes, but its header of {num_sequences} sequences says {expected}: truncated")
    if num_bounds < 2:
        raise bad(path, "has no documents", "leave it out with --include")
    index = _Index(path, num_sequences, num_bounds, TOKEN_DTYPES[DTYPES[code]])
    num_tokens, is_contiguous = index.check()
    return [
        TokenFile(
            path=path.with_suffix(".bin"),
            dtype=index.dtype,
            num_tokens=num_tokens,
            boundaries=INDEX,
            ends=index.ends,
            segments=None if is_contiguous else index.segments,
        )
    ]


class _Index:
    """The arrays of an .idx, read in blocks."""

    def __init__(self, path: Path, num_sequences: int, num_bounds: int, dtype: np.dtype):
        self.path, self.num_sequences, self.num_bounds, self.dtype = path, num_sequences, num_bounds, dtype

    def _sequences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of (tokens, byte offsets) of the sequences, int64 [n] each."""
        block = 2**18
        for first in range(0, self.num_sequences, block):
            count = min(block, self.num_sequences - first)
            (lengths,) = read_numbers(self.path, LENGTH, offset=HEADER_BYTES + 4 * first, count=count)
            at = HEADER_BYTES + 4 * self.num_sequences + 8 * first
            (offsets,) = read_numbers(self.path, OFFSET, offset=at, count=count)
            yield lengths.astype(np.int64), offsets.astype(np.int64)

    def check(self) -> tuple[int, bool]:
        """(number of tokens, whether they are contiguous). ValueError if a sequence or document is impossible."""
        tokens_path = self.path.with_suffix(".bin")
        num_bytes, itemsize = file_size(tokens_path), self.dtype.itemsize
        num_tokens, is_contiguous = 0, True
        for lengths, offsets in self._sequences():
            if lengths.min() < 0:
                raise bad(self.path, "has a sequence of a negative number of tokens: damaged")
            ends = lengths * itemsize + np.maximum(offsets, 0)
            if offsets.min() < 0 or offsets.max() > num_bytes or ends.max() > num_bytes:
                raise bad(
                    tokens_path, f"has {num_bytes} bytes, fewer than its sequences in {self.path.name}: truncated"
                )
            starts = np.cumsum(lengths) - lengths + num_tokens
            is_contiguous = is_contiguous and bool(np.all((offsets == starts * itemsize) | (lengths == 0)))
            num_tokens += int(lengths.sum())
            if num_tokens * itemsize > num_bytes:
                raise bad(self.path, f"has more tokens than the {num_bytes} bytes of {tokens_path.name}: damaged")
        if is_contiguous and num_tokens * itemsize != num_bytes:
            raise bad(
                tokens_path,
                f"has {num_bytes} bytes, but {self.path.name} says {num_tokens * itemsize}: another file, or it grew",
            )
        if not num_tokens:
            raise bad(self.path, "has no tokens", "leave it out with --include")
        previous = 0
        first = True
        for bounds in self._bounds():
            if (first and bounds[0] != 0) or bounds[0] < previous or np.any(bounds[1:] < bounds[:-1]):
                raise bad(self.path, "its documents do not rise from sequence 0: damaged")
            previous, first = int(bounds[-1]), False
        if previous != self.num_sequences:
            raise bad(self.path, f"its documents end at sequence {previous} of {self.num_sequences}: damaged")
        return num_tokens, is_contiguous

    def _bounds(self) -> Iterator[np.ndarray]:
        at = HEADER_BYTES + 12 * self.num_sequences
        return read_numbers(self.path, OFFSET, offset=at, count=self.num_bounds)

    def ends(self) -> Iterator[np.ndarray]:
        """The ends of the documents in tokens, blocks of int64."""
        bounds = self._bounds()
        waiting = next(bounds)[1:]  # the first is 0, the start of the first document
        first_sequence = first_token = 0
        for lengths, _ in self._sequences():
            sums = np.concatenate(([0], np.cumsum(lengths))) + first_token
            last_sequence = first_sequence + len(lengths)
            while True:
                inside = int(np.searchsorted(waiting, last_sequence, side="right"))
                if inside:
                    yield sums[waiting[:inside] - first_sequence]
                waiting = waiting[inside:]
                if len(waiting) or (following := next(bounds, None)) is None:
                    break
                waiting = following
            first_sequence, first_token = last_sequence, int(sums[-1])

    def segments(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(byte offsets, tokens) of the sequences that are not empty."""
        for lengths, offsets in self._sequences():
            if lengths.any():
                yield offsets[lengths > 0], lengths[lengths > 0]
