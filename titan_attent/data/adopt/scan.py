"""Scans a piece of a token file: hashes its bytes, checks every id, finds documents by ids, and packs its mask.

Cost: one read of the tokens, in blocks that stay in a core's cache; most of it is the hash. numpy and hashlib release
the interpreter lock, so pieces are scanned on threads.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titan_attent.data.adopt.boundaries import Rule
from titan_attent.data.adopt.pieces import Piece
from titan_attent.data.formats.token_file import INDEX, NONE, TokenFile, bad
from titan_attent.data.text.document_files import END_DTYPE, HashedFile, MaskFile, documents_file, mask_file
from titan_attent.data.text.file_view import SEGMENT_DTYPE, segments_file

BLOCK_BYTES = 2**18
"""Bytes per read: a block and what is computed of it stay in the cache of a core."""
_SEGMENT_BLOCK = 2**22
"""Bytes per read of tokens in segments."""


class Scanned(NamedTuple):
    """What a scan finds.

    Attributes:
        is_cut: whether the piece begins or ends inside a document, as far as its separators tell.
    """

    sha256: str
    max_token_id: int
    num_documents: int
    documents_sha256: str
    mask_sha256: str
    is_cut: bool


def scan(
    file: TokenFile,
    piece: Piece,
    rule: Rule,
    *,
    folder: Path,
    vocab_size: int,
    read: Callable[[int], object] = lambda size: None,
) -> Scanned:
    """Scan ``piece`` of ``file``, and write the files of its documents and mask.

    Args:
        folder: of these files.
        vocab_size: every id is below it.
        read: called with the number of bytes of every block.

    Raises:
        ValueError: an id is outside of the vocabulary, the file is shorter than its header says, or a mask is not one.
        OSError: the disk fails or is full.
    """
    finds = rule.kind not in (INDEX, NONE)
    ends = HashedFile(folder / documents_file(piece.name)) if finds else None
    unsigned = np.dtype(f"u{file.dtype.itemsize}").newbyteorder(file.dtype.byteorder)
    sha256, limit = hashlib.sha256(), min(vocab_size, 2 ** (8 * file.dtype.itemsize))
    done = num_documents = 0
    largest = first = previous = last_end = -1
    try:
        for tokens in _blocks(file, piece, sha256.update, folder=folder, read=read):
            # Negative ids are huge as unsigned numbers.
            block_largest = int(tokens.view(unsigned).max())
            if block_largest >= limit:
                raise _outside(file, piece, done, tokens, vocab_size)
            largest = max(largest, block_largest)
            if ends is not None:
                found = rule.ends(tokens, previous) + done
                if len(found) and found[0] == 0:
                    found = found[1:]
                if len(found):
                    ends.write(found.astype(END_DTYPE).data)
                    num_documents, last_end = num_documents + len(found), int(found[-1])
            first = int(tokens[0]) if first < 0 else first
            previous, done = int(tokens[-1]), done + len(tokens)
        if ends is not None and last_end != done:  # the rest, without a separator behind it
            ends.write(np.array([done], dtype=END_DTYPE).data)
            num_documents += 1
        return Scanned(
            sha256.hexdigest(),
            largest,
            num_documents if finds else piece.num_documents,
            ends.finish() if ends is not None else piece.documents_sha256,
            pack_mask(file, piece, folder) if file.mask is not None else "",
            finds and not rule.is_whole(first, previous),
        )
    finally:
        if ends is not None:
            ends.discard()


def _outside(file: TokenFile, piece: Piece, done: int, tokens: np.ndarray, vocab_size: int) -> ValueError:
    outside = np.flatnonzero(
        (tokens < 0) | (tokens >= vocab_size) if tokens.dtype.kind == "i" else tokens >= vocab_size
    )
    slot = int(outside[0])
    return bad(
        file.path,
        f"token {piece.start + done + slot} has the id {tokens[slot]}, but the tokenizer has {vocab_size} ids",
        f"give the tokenizer that wrote the file; or its tokens are not {file.dtype.name}",
    )


def _blocks(
    file: TokenFile,
    piece: Piece,
    update: Callable[[memoryview], object],
    *,
    folder: Path,
    read: Callable[[int], object],
) -> Iterator[np.ndarray]:
    """Yield the tokens of a piece in blocks, all of whose bytes are given to ``update``, in order."""
    if piece.num_segments:
        yield from _blocks_of_segments(file, piece, update, folder=folder, read=read)
        return
    buffer = np.empty(BLOCK_BYTES // file.dtype.itemsize, dtype=file.dtype)
    content = buffer.view(np.uint8).data
    with open(file.path, "rb", buffering=0) as raw:
        done = reported = 0
        while done < piece.num_bytes:
            size = min(len(content), piece.num_bytes - done)
            _fill(raw.fileno(), content[:size], piece.offset + done, file.path)
            update(content[:size])
            yield buffer[: size // file.dtype.itemsize]
            done += size
            if done - reported >= _SEGMENT_BLOCK or done == piece.num_bytes:
                read(done - reported)
                reported = done


def _fill(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise bad(path, f"ends at byte {offset + done}, while it is read: it was truncated", "adopt it again")
        done += count


def _blocks_of_segments(
    file: TokenFile,
    piece: Piece,
    update: Callable[[memoryview], object],
    *,
    folder: Path,
    read: Callable[[int], object],
) -> Iterator[np.ndarray]:
    """As :func:`_blocks`, where the tokens are in segments. The bytes are hashed in the order of the file."""
    size, num_tokens = file.dtype.itemsize, piece.stop - piece.start
    table = np.fromfile(folder / segments_file(piece.name), dtype=SEGMENT_DTYPE).reshape(-1, 2).astype(np.int64)
    offsets, lengths = table[:, 1], np.diff(table[:, 0], append=num_tokens)
    stops, end = offsets + lengths * size, piece.offset + piece.num_bytes
    content = np.empty(_SEGMENT_BLOCK, dtype=np.uint8)
    with open(file.path, "rb", buffering=0) as raw:

        def hashed(start: int, stop: int) -> np.ndarray:
            part = content[: stop - start]
            _fill(raw.fileno(), part.data, start, file.path)
            update(part.data)
            read(len(part))
            return part

        if np.any(offsets[1:] < stops[:-1]):  # the tokens are in another order than their bytes
            yield from _unordered(raw.fileno(), file, offsets.tolist(), lengths.tolist())
            for start in range(piece.offset, end, _SEGMENT_BLOCK):
                hashed(start, min(start + _SEGMENT_BLOCK, end))
            return
        offsets, stops = _split(offsets, stops, _SEGMENT_BLOCK // size * size)
        slot, at = 0, piece.offset
        while at < end:
            stop = int(np.searchsorted(stops, at + _SEGMENT_BLOCK, side="right"))
            if stop == slot:  # only bytes before the next segment
                until = int(min(at + _SEGMENT_BLOCK, offsets[slot]))
                hashed(at, until)
                at = until
                continue
            part = hashed(at, int(stops[stop - 1]))
            places = zip((offsets[slot:stop] - at).tolist(), (stops[slot:stop] - at).tolist(), strict=True)
            yield np.concatenate([part[first:last] for first, last in places]).view(file.dtype)
            slot, at = stop, int(stops[stop - 1])


def _split(offsets: np.ndarray, stops: np.ndarray, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The same bytes in segments of at most ``max_bytes``."""
    counts = -(-(stops - offsets) // max_bytes)
    slots = np.repeat(np.arange(len(offsets)), counts)
    within = np.arange(len(slots)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[slots] + within * max_bytes
    return starts, np.minimum(starts + max_bytes, stops[slots])


def _unordered(descriptor: int, file: TokenFile, offsets: list[int], lengths: list[int]) -> Iterator[np.ndarray]:
    for offset, length in zip(offsets, lengths, strict=True):
        for first in range(0, length, BLOCK_BYTES):
            tokens = np.empty(min(BLOCK_BYTES, length - first), dtype=file.dtype)
            _fill(descriptor, tokens.view(np.uint8).data, offset + first * file.dtype.itemsize, file.path)
            yield tokens


def pack_mask(file: TokenFile, piece: Piece, folder: Path) -> str:
    """Write the mask of a piece, one bit per token. Returns its sha256 (hex)."""
    assert file.mask is not None
    mask = MaskFile(folder / mask_file(piece.name))
    try:
        with open(file.mask, "rb", buffering=0) as raw:
            for start in range(piece.start, piece.stop, _SEGMENT_BLOCK):
                counts = np.empty(min(_SEGMENT_BLOCK, piece.stop - start), dtype=np.uint8)
                _fill(raw.fileno(), counts.data, start, file.mask)
                if counts.max() > 1:
                    raise bad(file.mask, f"holds the byte {counts.max()}; a mask has 0 or 1 for each token")
                mask.append(counts.astype(bool))
        return mask.finish()
    finally:
        mask.discard()
