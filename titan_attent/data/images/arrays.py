"""Images of a .npz file, streamed from the zip file, compressed or not.

Before anything is unpacked, the shape and dtype in the header of an array must match the bytes that the zip file
declares for it.

Cost: 1 MiB of images and 1 MiB of labels in memory, or one image if it is larger; an array in Fortran's order is in
memory as a whole.
"""

import ast
import contextlib
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from titan_attent.data.images.examples import IMAGE_KEYS, LABEL_KEYS, Bad, Example, Label, Limits, choose_key
from titan_attent.data.io.walk import LeftOut

_BLOCK = 2**20
_CHANNELS = (1, 3, 4)
_MAX_HEADER_CHARS = 2**9
"""Longest header of an array, in characters; numpy writes about 100."""
_MAX_CLASS_NAME_BYTES = 2**26
"""Largest array of class names, in bytes."""
_MAX_FORTRAN_BYTES = 2**32
"""Largest array of images in Fortran's order, in bytes."""


class _Array(NamedTuple):
    """The header of an array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArraysInput:
    """A .npz file with images and labels.

    Images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], labels integers [N]. An array ``classes`` of names is
    optional.

    Raises:
        ValueError: the file is damaged, or the images are above the limits. Also if an array is missing, holds Python
            objects, or has a wrong dtype, an ambiguous shape, or another size than its header declares.
    """

    holds_files = False
    ordered = True
    left_out, num_unread, num_images = LeftOut(), 0, None

    def __init__(self, path: Path, *, keys: tuple[str, str] | None, limits: Limits):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
        except Exception as error:  # zipfile raises nearly anything on damaged bytes
            raise ValueError(f"{path}: damaged or not a .npz file ({error}); copy or write it again") from error
        image_key, label_key = keys or (None, None)
        where = str(path)
        self.image_key = choose_key(names, requested=image_key, defaults=IMAGE_KEYS, role="images", where=where)
        self.label_key = choose_key(names, requested=label_key, defaults=LABEL_KEYS, role="labels", where=where)
        has_classes = "classes" in names
        if has_classes:
            choose_key(names, requested="classes", defaults=(), role="classes", where=where)
        try:
            with zipfile.ZipFile(path) as archive:
                self._images, numbers = (_header(archive, key) for key in (self.image_key, self.label_key))
                classes = _read_names(archive) if has_classes else None
        except Exception as error:
            raise ValueError(f"{path}: its arrays cannot be read ({error}); write the file again") from error
        self.shape, dtype = self._images.shape, self._images.dtype
        if dtype != np.uint8:
            raise ValueError(
                f"{path}: array {self.image_key!r} is {dtype}, not uint8; scale it to 0 to 255 and cast it"
            )
        self.channels_at = self._find_channels()
        self._check_size(limits)
        if numbers.dtype.kind not in "iu" or numbers.shape not in (self.shape[:1], (*self.shape[:1], 1)):
            raise ValueError(
                f"{path}: array {self.label_key!r} is {numbers.dtype} of shape {numbers.shape}; labels are integers, "
                f"one for each of the {self.shape[0]} images"
            )
        self.names = classes

    def _find_channels(self) -> int | None:
        """The axis of an image that holds its channels, None for [H, W]; ValueError if it is ambiguous."""
        shape = self.shape
        at = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] in _CHANNELS]
        if len(shape) not in (3, 4) or 0 in shape or (len(shape) == 4 and len(at) != 1):
            raise ValueError(
                f"{self.path}: array {self.image_key!r} has shape {shape}, not clearly [N, H, W], [N, H, W, C] or "
                "[N, C, H, W] with 1, 3 or 4 channels; reshape it to [N, H, W, C]"
                + (" in which only one of H and C is 1, 3 or 4" if len(at) == 2 else "")
            )
        return at[0] - 1 if at else None

    def _check_size(self, limits: Limits) -> None:
        sides = [side for axis, side in enumerate(self.shape[1:]) if axis != self.channels_at]
        if math.prod(sides) > limits.pixels:
            raise ValueError(
                f"{self.path}: array {self.image_key!r} has shape {self.shape}, images of more than "
                f"{limits.pixels:,} pixels, the limit; make them smaller, or raise --max-pixels"
            )
        if self._images.fortran and self._images.num_bytes > _MAX_FORTRAN_BYTES:
            raise ValueError(
                f"{self.path}: array {self.image_key!r} has {self._images.num_bytes:,} bytes in Fortran's order, which "
                "are all in memory at once; write it in C's order (np.ascontiguousarray)"
            )

    def labels(self) -> Iterator[Label]:
        labels: set[int] = set()
        with contextlib.suppress(Exception):  # examples() reports it
            for numbers in self._blocks(self.label_key):
                labels.update(np.unique(numbers).tolist())
        return (number for number in sorted(labels) if number >= 0)

    def examples(self) -> Iterator[Example | Bad]:
        row = 0
        try:
            numbers = (int(number) for block in self._blocks(self.label_key) for number in block.reshape(-1))
            for row, (image, number) in enumerate(zip(self._rows(), numbers, strict=True)):
                where = f"{self.path}: image {row}"
                pixels = image[..., None] if self.channels_at is None else np.moveaxis(image, self.channels_at, 2)
                if self.names is None:
                    label: Label = number
                elif 0 <= number < len(self.names):
                    label = self.names[number]
                else:
                    problem = f"label {number} is outside [0, {len(self.names)}), the classes of the file"
                    yield Bad(where, "label", problem, "correct or remove it")
                    continue
                yield Example(where, np.ascontiguousarray(pixels), label)
        except Exception as error:  # zipfile raises nearly anything on damaged bytes
            yield Bad(f"{self.path}: after image {row}", "damaged", f"the file is damaged ({error})", "write it again")

    def _rows(self) -> Iterator[np.ndarray]:
        if self._images.fortran:
            with zipfile.ZipFile(self.path) as archive:
                yield from _read(archive, self.image_key)
        else:
            for block in self._blocks(self.image_key):
                yield from block

    def _blocks(self, key: str) -> Iterator[np.ndarray]:
        """The rows (first axis) of an array in C's order, about ``_BLOCK`` bytes at a time."""
        with zipfile.ZipFile(self.path) as archive, _member(archive, key) as member:
            array = _read_header(member)
            size, left = math.prod(array.shape[1:]) * array.dtype.itemsize, array.shape[0]
            while left:
                rows = min(left, max(1, _BLOCK // size))
                yield _read_exactly(member, rows * size, key).view(array.dtype).reshape(rows, *array.shape[1:])
                left -= rows


def _member(archive: zipfile.ZipFile, key: str) -> IO[bytes]:
    name = f"{key}.npy" if f"{key}.npy" in archive.NameToInfo else key
    return archive.open(name)


def _header(archive: zipfile.ZipFile, key: str) -> _Array:
    """The header of an array of the file; ValueError if it does not match the size that the zip file declares."""
    with _member(archive, key) as member:
        try:
            array = _read_header(member)
        except ValueError as error:
            raise ValueError(f"array {key!r}: {error}") from error
        declared = archive.getinfo(member.name or "").file_size - member.tell()
    if declared != array.num_bytes:
        raise ValueError(
            f"array {key!r} is {array.dtype} of shape {array.shape}, {array.num_bytes:,} bytes, but has {declared:,}"
        )
    return array


def _read_header(member: IO[bytes]) -> _Array:
    """The header of a .npy; ValueError for a header that numpy would not write, and for Python objects (pickles)."""
    start = member.read(8)
    version = start[6:] if start[:6] == b"\x93NUMPY" else b""
    if version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("not a .npy file of version 1 to 3")
    size = int.from_bytes(member.read(2 if version == b"\1\0" else 4), "little")
    # numpy pads with blanks. A longer header might be nested too deeply for Python's parser.
    text = member.read(min(size, 2**16)).decode("utf-8").strip()
    if size > 2**16 or len(text) > _MAX_HEADER_CHARS:
        raise ValueError(f"its header has {size} characters, too many")
    try:
        fields = ast.literal_eval(re.sub(r"(?<=\d)L(?=[,)])", "", text))  # Python 2 wrote 28L
        shape, fortran, dtype = fields["shape"], fields["fortran_order"], np.dtype(fields["descr"])
    except Exception as error:
        raise ValueError(f"its header is not one that numpy writes: {text[:80]}") from error
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its shape is {shape!r}, not a tuple of integers from 0 on")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickles and are not read")
    return _Array(shape, bool(fortran), dtype)


def _read_exactly(member: IO[bytes], size: int, key: str) -> np.ndarray:
    data = member.read(size)
    if len(data) < size:
        raise EOFError(f"array {key!r} ends early")
    return np.frombuffer(data, dtype=np.uint8)


def _read(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """A whole array."""
    with _member(archive, key) as member:
        array = _read_header(member)
        flat = _read_exactly(member, array.num_bytes, key).view(array.dtype)
    return flat.reshape(array.shape, order="F" if array.fortran else "C")


def _read_names(archive: zipfile.ZipFile) -> list[str]:
    classes = _header(archive, "classes")
    if classes.dtype.kind != "U" or len(classes.shape) != 1:
        raise ValueError(f"array 'classes' is {classes.dtype} of shape {classes.shape}, not a list of names")
    if classes.num_bytes > _MAX_CLASS_NAME_BYTES:
        raise ValueError(f"array 'classes' has {classes.num_bytes:,} bytes, more than {_MAX_CLASS_NAME_BYTES:,}")
    return [str(name) for name in _read(archive, "classes")]
