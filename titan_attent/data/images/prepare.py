"""Prepares images for writing, by several threads, in order: checks the header, decodes, checks the format, resizes.

Cost: at most 64 images or 128 MiB per thread in memory, whichever is less, counted in decoded bytes. An image larger
than that is processed by itself. With one thread, one image is in memory.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from titan_attent.data.images.classes import Classes
from titan_attent.data.images.examples import MAX_PIXELS, Bad, Example
from titan_attent.data.images.pictures import FILE_FORMATS, TooLarge, decode_picture, from_array, open_picture, square

_CHUNK = 16
"""Images per chunk, the unit of work of a thread."""
_CHUNK_BYTES = 2**25
_THREAD_BYTES = 2**27
_PIXEL_BYTES = 4
"""Bytes per pixel of a picture in Pillow."""


class Opened(NamedTuple):
    """An image whose header has been read."""

    where: str
    stored: bytes | np.ndarray
    picture: Image.Image | None
    """None if the image is an array."""
    label: int
    num_bytes: int
    """Bytes in memory, stored and decoded together."""


class Prepared(NamedTuple):
    """An image ready to be written."""

    where: str
    data: bytes
    size: tuple[int, int]
    """Width, height."""
    label: int
    histogram: list[int]
    """Counts of the values of its pixels, 256 per channel."""
    gray: bool
    """Whether it was stored as one channel."""


@dataclass(frozen=True)
class Preparation:
    """Turns an image of an input into the bytes to write, in two steps: :meth:`open` is fast, calling it is slow.

    Attributes:
        encoding: "raw" or "file".
        channels: 1 or 3.
        size: side of the centre square, 0 to keep the image's size.
        max_pixels: an image that claims more pixels is not decoded.
    """

    classes: Classes
    encoding: str
    channels: int
    size: int
    max_pixels: int = MAX_PIXELS

    def open(self, example: Example | Bad) -> Opened | Bad:
        if isinstance(example, Bad):
            return example
        where, stored, given_label = example
        try:
            label = self.classes.index(given_label)
        except ValueError as error:
            return Bad(where, "label", str(error), "correct it, or the list of classes")
        if not isinstance(stored, bytes):
            return Opened(where, stored, None, label, stored.nbytes * (1 + _PIXEL_BYTES))
        try:
            picture = open_picture(stored, max_pixels=self.max_pixels)
        except TooLarge as error:
            return Bad(where, "undecodable", str(error), "replace or remove it, or raise --max-pixels")
        except ValueError as error:
            return Bad(where, "undecodable", str(error), "replace or remove it")
        return Opened(where, stored, picture, label, len(stored) + _PIXEL_BYTES * picture.width * picture.height)

    def __call__(self, example: Opened | Bad) -> Prepared | Bad:
        if isinstance(example, Bad):
            return example
        where, stored, picture, label, _ = example
        file_format = ""
        try:
            if picture is not None:
                image, file_format, gray = decode_picture(picture, channels=self.channels)
            else:
                assert isinstance(stored, np.ndarray)
                image, gray = from_array(stored, channels=self.channels), stored.shape[2] == 1
        except ValueError as error:
            return Bad(where, "undecodable", str(error), "replace or remove it")
        if self.encoding == "file":
            assert isinstance(stored, bytes)
            if file_format not in FILE_FORMATS:
                problem = f"is {file_format}, but encoding file stores JPEG, PNG and WebP"
                return Bad(where, "undecodable", problem, "convert it, or write with --encoding raw")
            return Prepared(where, stored, image.size, label, image.histogram(), gray)
        if self.size:
            image = square(image, self.size)
        return Prepared(where, image.tobytes(), image.size, label, image.histogram(), gray)


def prepare(
    preparation: Preparation, examples: Iterable[Example | Bad], *, num_threads: int
) -> Generator[Prepared | Bad, None, None]:
    """Prepare examples with ``num_threads`` threads, in order. The caller's thread reads and opens the examples."""
    all_opened = map(preparation.open, examples)
    if num_threads == 1:
        yield from map(preparation, all_opened)
        return
    pending, pending_bytes = deque[tuple[Future[list[Prepared | Bad]], int]](), 0
    with ThreadPoolExecutor(num_threads, thread_name_prefix="titan_attent-images") as threads:
        try:
            for chunk, num_bytes in _chunks(all_opened):
                max_bytes = num_threads * _THREAD_BYTES
                while pending and (len(pending) > 3 * num_threads or pending_bytes + num_bytes > max_bytes):
                    future, freed_bytes = pending.popleft()
                    yield from future.result()
                    del future
                    pending_bytes -= freed_bytes
                pending.append((threads.submit(_prepare_all, preparation, chunk), num_bytes))
                pending_bytes += num_bytes
            while pending:
                yield from pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


def _prepare_all(preparation: Preparation, chunk: list[Opened | Bad]) -> list[Prepared | Bad]:
    done: list[Prepared | Bad] = []
    chunk.reverse()
    while chunk:  # pop: the memory of each image is freed once it is done
        done.append(preparation(chunk.pop()))
    return done


def _chunks(examples: Iterable[Opened | Bad]) -> Iterator[tuple[list[Opened | Bad], int]]:
    """Chunks of at most ``_CHUNK`` examples and ``_CHUNK_BYTES`` bytes (or one larger example), with their bytes."""
    chunk: list[Opened | Bad] = []
    num_bytes = 0
    for example in examples:
        example_bytes = 0 if isinstance(example, Bad) else example.num_bytes
        if chunk and (len(chunk) == _CHUNK or num_bytes + example_bytes > _CHUNK_BYTES):
            yield chunk, num_bytes
            chunk, num_bytes = [], 0
        chunk.append(example)
        num_bytes += example_bytes
    if chunk:
        yield chunk, num_bytes
