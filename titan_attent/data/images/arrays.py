"""Images of a .npz file, streamed row by row out of the zip file, packed or not.

Cost: a megabyte of images, and all labels, in memory; of arrays in Fortran's order all images.
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from titan_attent.data.images.examples import IMAGE_KEYS, LABEL_KEYS, Bad, Example, Label, Limits, choose
from titan_attent.data.walk import LeftOut

_BLOCK = 2**20
_CHANNELS = (1, 3, 4)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


class ArraysInput:
    """A .npz file: images uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], labels of integers [N], perhaps ``classes``.

    Raises:
        ValueError: it is damaged, or its arrays are missing, of another type or shape, or of an ambiguous one.
    """

    holds_files = False
    ordered = True
    left_out, num_unread, num_images = LeftOut(), 0, None

    def __init__(self, path: Path, *, keys: tuple[str, str] | None, limits: Limits):
        self.path, self.limits = path, limits
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = list(arrays.files)
        except _DAMAGE as error:
            raise ValueError(f"{path}: damaged or not a .npz file ({error}); copy or write it again") from error
        wanted = keys or (None, None)
        where = str(path)
        self.image_key = choose(names, wanted=wanted[0], usual=IMAGE_KEYS, what="images", where=where)
        label_key = choose(names, wanted=wanted[1], usual=LABEL_KEYS, what="labels", where=where)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                numbers = arrays[label_key]
                classes = arrays["classes"] if "classes" in names else None
            with zipfile.ZipFile(path) as archive, archive.open(f"{self.image_key}.npy") as member:
                self.shape, self.fortran, dtype = _read_header(member)
        except _DAMAGE as error:
            raise ValueError(f"{path}: its arrays cannot be read ({error}); write the file again") from error
        if dtype != np.uint8:
            raise ValueError(
                f"{path}: array {self.image_key!r} is {dtype}, not uint8; scale it to 0 to 255 and cast it"
            )
        self.channels_at = self._find_channels()
        if numbers.shape == (len(numbers), 1):
            numbers = numbers[:, 0]
        if numbers.dtype.kind not in "iu" or numbers.shape != self.shape[:1]:
            raise ValueError(
                f"{path}: array {label_key!r} is {numbers.dtype} of shape {numbers.shape}; labels are integers, one "
                f"for each of the {self.shape[0]} images"
            )
        self.numbers = numbers
        if classes is not None and (classes.dtype.kind != "U" or classes.ndim != 1):
            raise ValueError(
                f"{path}: array 'classes' is {classes.dtype} of shape {classes.shape}, not a list of names"
            )
        self.names = None if classes is None else [str(name) for name in classes]

    def _find_channels(self) -> int | None:
        """The axis of an image that holds its channels, None for [H, W]; ValueError if it is not clear."""
        shape = self.shape
        at = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] in _CHANNELS]
        if len(shape) not in (3, 4) or 0 in shape or (len(shape) == 4 and len(at) != 1):
            raise ValueError(
                f"{self.path}: array {self.image_key!r} has shape {shape}, in which images [N, H, W], [N, H, W, C] or "
                "[N, C, H, W], of 1, 3 or 4 channels, are not clear; bring it to [N, H, W, C]"
                + (" and keep one axis alone at 1, 3 or 4" if len(at) == 2 else "")
            )
        return at[0] - 1 if at else None

    def labels(self) -> Iterator[Label]:
        return (int(number) for number in np.unique(self.numbers) if number >= 0)

    def examples(self) -> Iterator[Example | Bad]:
        row = 0
        try:
            for row, image in enumerate(self._images()):
                where, number = f"{self.path}: image {row}", int(self.numbers[row])
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
        except _DAMAGE as error:
            yield Bad(f"{self.path}: after image {row}", "damaged", f"the file is damaged ({error})", "write it again")

    def _images(self) -> Iterator[np.ndarray]:
        if self.fortran:
            with np.load(self.path, allow_pickle=False) as arrays:
                yield from arrays[self.image_key]
            return
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.image_key}.npy") as member:
            _read_header(member)
            left = self.shape[0]
            while left:
                rows = min(left, max(1, _BLOCK // size))
                data = member.read(rows * size)
                if len(data) < rows * size:
                    raise EOFError(f"array {self.image_key!r} ends early")
                yield from np.frombuffer(data, dtype=np.uint8).reshape(rows, *self.shape[1:])
                left -= rows


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"a .npy of version {version}")
    return read[version](member)
