"""Reads boxes of a tensor whose pieces lie in files: the shards that ranks wrote, or one piece per tensor.

A piece is a box of the tensor that lies in its file as its plain bytes. For each box only its bytes are read, into the
memory that holds the result, except of pieces that are not in row-major order: those are read whole.

Cost: one positioned read per box and piece; memory of one box, or of one piece that is not in row-major order.
"""

import io
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, cast

import torch
from torch import Tensor

from titan_attent.edit.boxes import Box, offsets, overlap, sizes, within
from titan_attent.edit.memory import empty
from titan_attent.edit.storage import is_remote
from titan_attent.edit.uncached import forget

MAX_OPEN = 32
"""Local files that a reader keeps open: a mean has many readers, and a process by default 1024 files."""
MAX_OPEN_REMOTE = 64
"""Remote ones, which take longer to open."""

Opener = Callable[[str], AbstractContextManager[io.IOBase]]
"""The name of a file of a checkpoint -> its bytes as a seekable stream."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in a file.

    Attributes:
        box: its range in the tensor.
        file: the file's name in the checkpoint.
        start: its first byte in the file.
        strides: in elements, as torch's; None for row-major order.
    """

    box: Box
    file: str
    start: int
    strides: tuple[int, ...] | None = None


class OpenFiles:
    """The files of a checkpoint, the :data:`MAX_OPEN` or :data:`MAX_OPEN_REMOTE` most recently read of them open.

    data/io/files.py is the same for local files; these may be remote.
    """

    def __init__(self, where: str, opener: Opener):
        self.where, self._open = where, opener
        self._files: OrderedDict[str, tuple[AbstractContextManager[io.IOBase], io.IOBase]] = OrderedDict()

    def stream(self, file: str) -> io.IOBase:
        """The open file; OSError if it cannot be opened."""
        if file not in self._files:
            if len(self._files) >= (MAX_OPEN_REMOTE if is_remote(self.where) else MAX_OPEN):
                _, (oldest, stream) = self._files.popitem(last=False)
                forget(stream)
                oldest.__exit__(None, None, None)
            context = self._open(file)
            self._files[file] = context, context.__enter__()
        self._files.move_to_end(file)
        return self._files[file][1]

    def forget(self) -> None:
        """Drop what was read from the system's cache."""
        for _, stream in self._files.values():
            forget(stream)

    def read_into(self, target: Tensor, file: str, start: int) -> None:
        """Fill ``target``, a contiguous tensor, with the bytes of ``file`` from ``start``; ValueError if it ends."""
        view = memoryview(cast(Any, target.flatten().view(torch.uint8).numpy()))
        stream = self.stream(file)
        stream.seek(start)
        while view:
            count = stream.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{self.where} is damaged: {file} ends {len(view):,} bytes early. Restore it")
            view = view[count:]


def read_box(pieces: Sequence[Piece], box: Box, dtype: torch.dtype, files: OpenFiles) -> Tensor:
    """The elements of ``box``, of the tensor with these ``pieces``, which do not overlap and cover it.

    Args:
        box: one run of the tensor in row-major order, as :func:`~titan_attent.edit.boxes.boxes` cuts it.
    """
    result = empty(sizes(box), dtype)
    if result.numel() == 0:
        return result
    for piece in pieces:
        shared = overlap(box, piece.box)
        if shared is None:
            continue
        if piece.strides is not None:
            result[within(shared, box)] = _whole(piece, dtype, files)[within(shared, piece.box)]
            continue
        start = piece.start + _index(offsets(shared), piece.box) * dtype.itemsize
        if shared == box:
            files.read_into(result, piece.file, start)
        else:
            part = empty(sizes(shared), dtype)
            files.read_into(part, piece.file, start)
            result[within(shared, box)] = part
    return result


def _whole(piece: Piece, dtype: torch.dtype, files: OpenFiles) -> Tensor:
    assert piece.strides is not None
    shape = sizes(piece.box)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, piece.strides, strict=True))
    storage = torch.empty(extent, dtype=dtype)
    files.read_into(storage, piece.file, piece.start)
    return storage.as_strided(shape, piece.strides)


def _index(position: Sequence[int], box: Box) -> int:
    """The number of elements of ``box`` before ``position`` in row-major order."""
    index = 0
    for place, (start, stop) in zip(position, box, strict=True):
        index = index * (stop - start) + place - start
    return index


def covers(pieces: Sequence[Piece], shape: Sequence[int]) -> bool:
    """Whether ``pieces`` cover a tensor of ``shape`` once: as many elements, none outside, no two overlap."""
    whole: Box = tuple((0, size) for size in shape)
    if sum(math.prod(sizes(piece.box)) for piece in pieces) != math.prod(shape):
        return False
    ordered = sorted(piece.box for piece in pieces if math.prod(sizes(piece.box)))
    if not all(len(box) == len(whole) and overlap(box, whole) == box for box in ordered):
        return False
    for i, box in enumerate(ordered if whole else ()):
        later = takewhile(lambda other, stop=box[0][1]: other[0][0] < stop, islice(ordered, i + 1, None))  # type: ignore[misc]
        if any(overlap(box, other) for other in later):
            return False
    return True
