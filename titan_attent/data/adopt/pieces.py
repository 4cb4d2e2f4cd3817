"""Cuts token files into pieces of whole documents: each becomes a shard, hashed by a thread of its own.

A piece ends at the first end of a document at or behind every ``shard_tokens`` tokens. Ends that the format's index
knows are written here; where ids separate documents, only the few ends at which to cut are searched. Tokens in segments
are one piece per file.

Cost: one read of the format's index; 4 MiB of tokens per piece and search, more in longer documents.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titan_attent.data.adopt.boundaries import Rule
from titan_attent.data.formats.token_file import INDEX, NONE, TokenFile, bad, read_numbers
from titan_attent.data.text.document_files import END_DTYPE, MAX_SHARD_TOKENS, HashedFile, documents_file
from titan_attent.data.text.file_view import MAX_SEGMENTS, SEGMENT_DTYPE, segments_file


class Piece(NamedTuple):
    """The tokens [start, stop) of a file, and the files that are written beside the index already.

    Attributes:
        name: of the shard; names the files beside the index.
        num_documents, documents_sha256: if the format's index has the documents, else 0 and "".
        offset, num_bytes: where the bytes of the tokens are.
        num_segments, segments_sha256: of the table of segments, if the tokens are not contiguous.
    """

    name: str
    start: int
    stop: int
    num_documents: int = 0
    documents_sha256: str = ""
    offset: int = 0
    num_bytes: int = 0
    num_segments: int = 0
    segments_sha256: str = ""


def cut(file: TokenFile, rule: Rule, *, folder: Path, shard_tokens: int, name: Callable[[], str]) -> list[Piece]:
    """The pieces of ``file``, in order.

    Args:
        folder: of the files of documents and segments.
        name: gives the name of the next shard.

    Raises:
        ValueError: the format's index does not fit the tokens, or a document is too long for a shard.
        OSError: the folder cannot be written.
    """
    if rule.kind == INDEX:
        pieces = _by_index(file, folder=folder, shard_tokens=shard_tokens, name=name)
    elif file.segments is not None:
        pieces = [Piece(name(), 0, file.num_tokens)]
    else:
        stops = [*_cuts(file, rule, shard_tokens), file.num_tokens]
        pieces = [Piece(name(), start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    longest = max(piece.stop - piece.start for piece in pieces)
    if longest > MAX_SHARD_TOKENS:
        raise bad(
            file.path,
            f"has {longest} tokens without an end of a document, more than the {MAX_SHARD_TOKENS} of a shard",
            "check --eos or --bos, or use --boundaries none",
        )
    if file.segments is not None:
        return [_with_segments(file, pieces[0], folder)]
    size = file.dtype.itemsize
    return [
        piece._replace(offset=file.offset + piece.start * size, num_bytes=(piece.stop - piece.start) * size)
        for piece in pieces
    ]


def _cuts(file: TokenFile, rule: Rule, shard_tokens: int) -> Iterator[int]:
    """Rising ends of documents, about every ``shard_tokens`` tokens, without the end of the file."""
    wanted = shard_tokens
    while wanted < file.num_tokens:
        end = wanted if rule.kind == NONE else _next_end(file, rule, wanted)
        if end >= file.num_tokens:
            return
        yield end
        wanted = end + shard_tokens


def _next_end(file: TokenFile, rule: Rule, wanted: int) -> int:
    """The first end of a document at or behind the token ``wanted`` > 0; the number of tokens if there is none."""
    size, first, previous = file.dtype.itemsize, wanted - 1, -1
    count = file.num_tokens - first
    for tokens in read_numbers(file.path, file.dtype, offset=file.offset + first * size, count=count):
        ends = rule.ends(tokens, previous) + first
        ends = ends[ends >= wanted]
        if len(ends):
            return int(ends[0])
        first, previous = first + len(tokens), int(tokens[-1])
    return file.num_tokens


def _by_index(file: TokenFile, *, folder: Path, shard_tokens: int, name: Callable[[], str]) -> list[Piece]:
    """The pieces by the ends that the format knows, which are written; documents without tokens are left out."""
    assert file.ends is not None
    pieces, previous = list[Piece](), 0
    shard_tokens = file.num_tokens if file.segments is not None else shard_tokens
    piece, ends_file = Piece(name(), 0, 0), None
    try:
        for block in file.ends():
            ends = block[np.diff(block, prepend=previous) > 0]
            previous = int(block[-1]) if len(block) else previous
            while len(ends):
                if ends_file is None:
                    ends_file = HashedFile(folder / documents_file(piece.name))
                inside = int(np.searchsorted(ends, piece.start + shard_tokens)) + 1
                taken, ends = ends[:inside], ends[inside:]
                if taken[-1] - piece.start > MAX_SHARD_TOKENS:
                    raise bad(
                        file.path, f"has a document of more than the {MAX_SHARD_TOKENS} tokens of a shard", "split it"
                    )
                ends_file.write((taken - piece.start).astype(END_DTYPE).tobytes())
                piece = piece._replace(stop=int(taken[-1]), num_documents=piece.num_documents + len(taken))
                if piece.stop - piece.start >= shard_tokens and piece.stop < file.num_tokens:
                    pieces.append(piece._replace(documents_sha256=ends_file.finish()))
                    piece, ends_file = Piece(name(), piece.stop, piece.stop), None
        if previous != file.num_tokens or ends_file is None:
            raise bad(file.path, f"its documents end at token {previous} of {file.num_tokens}: damaged")
        pieces.append(piece._replace(documents_sha256=ends_file.finish()))
    finally:
        if ends_file is not None:
            ends_file.discard()
    return pieces


def _with_segments(file: TokenFile, piece: Piece, folder: Path) -> Piece:
    """The piece of a file with segments, whose table is written; neighbouring segments are joined."""
    assert file.segments is not None
    table = HashedFile(folder / segments_file(piece.name))
    count = done = behind = 0
    first = last = -1
    try:
        for offsets, lengths in file.segments():
            stops = offsets + lengths * file.dtype.itemsize
            is_new = offsets != np.concatenate(([behind if count else -1], stops[:-1]))
            starts = done + np.cumsum(lengths) - lengths
            rows = np.stack([starts[is_new], offsets[is_new]], axis=1)
            table.write(rows.astype(SEGMENT_DTYPE).tobytes())
            count, done, behind = count + len(rows), done + int(lengths.sum()), int(stops[-1])
            first = int(offsets.min()) if first < 0 else min(first, int(offsets.min()))
            last = max(last, int(stops.max()))
        if count > MAX_SEGMENTS:
            raise bad(
                file.path, f"has its tokens in {count} separate places, more than {MAX_SEGMENTS}", "write it anew"
            )
        return piece._replace(offset=first, num_bytes=last - first, num_segments=count, segments_sha256=table.finish())
    finally:
        table.discard()
