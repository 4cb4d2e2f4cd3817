"""What the writer does to every image: look at its header, decode, check, resize; by several threads, in order.

Cost: at most 64 images or 128 MiB a thread in memory, whichever is less, counted as they are decoded; an image that has
more by itself is alone. One thread alone holds one image.
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
from titan_attent.data.images.pictures import FILE_FORMATS, TooLarge, decoded, from_array, opened, square

_CHUNK = 16
"""Images that a thread takes at a time."""
_CHUNK_BYTES = 2**25
_THREAD_BYTES = 2**27
_PIXEL_BYTES = 4
"""Of a picture in Pillow."""


class Opened(NamedTuple):
    """An image of which the header is known."""

    where: str
    stored: bytes | np.ndarray
    picture: Image.Image | None
    """None of an array."""
    label: int
    num_bytes: int
    """As stored and decoded."""


class Prepared(NamedTuple):
    """An image as it is written."""

    where: str
    data: bytes
    size: tuple[int, int]
    """Width, height."""
    label: int
    histogram: list[int]
    """Of its pixels, 256 counts a channel."""
    gray: bool
    """Whether it was stored as one channel."""


@dataclass(frozen=True)
class Preparation:
    """From an image as it was found to what is written of it, in two parts: :meth:`open` is quick, a call is not.

    Attributes:
        encoding: "raw" or "file".
        channels: 1 or 3.
        size: side of the centre square, 0 to leave the image as it is.
        max_pixels: of an image that claims more, nothing is decoded.
    """

    classes: Classes
    encoding: str
    channels: int
    size: int
    max_pixels: int = MAX_PIXELS

    def open(self, example: Example | Bad) -> Opened | Bad:
        if isinstance(example, Bad):
            return example
        where, stored, found = example
        try:
            label = self.classes.number(found)
        except ValueError as error:
            return Bad(where, "label", str(error), "correct it, or the list of classes")
        if not isinstance(stored, bytes):
            return Opened(where, stored, None, label, stored.nbytes * (1 + _PIXEL_BYTES))
        try:
            picture = opened(stored, max_pixels=self.max_pixels)
        except TooLarge as error:
            return Bad(where, "undecodable", str(error), "replace or remove it, or raise --max-pixels")
        except ValueError as error:
            return Bad(where, "undecodable", str(error), "replace or remove it")
        return Opened(where, stored, picture, label, len(stored) + _PIXEL_BYTES * picture.width * picture.height)

    def __call__(self, example: Opened | Bad) -> Prepared | Bad:
        if isinstance(example, Bad):
            return example
        where, stored, picture, label, _ = example
        kind = ""
        try:
            if picture is not None:
                image, kind, gray = decoded(picture, channels=self.channels)
            else:
                assert isinstance(stored, np.ndarray)
                image, gray = from_array(stored, channels=self.channels), stored.shape[2] == 1
        except ValueError as error:
            return Bad(where, "undecodable", str(error), "replace or remove it")
        if self.encoding == "file":
            assert isinstance(stored, bytes)
            if kind not in FILE_FORMATS:
                problem = f"is {kind}, but encoding file keeps JPEG, PNG and WebP"
                return Bad(where, "undecodable", problem, "convert it, or write with --encoding raw")
            return Prepared(where, stored, image.size, label, image.histogram(), gray)
        if self.size:
            image = square(image, self.size)
        return Prepared(where, image.tobytes(), image.size, label, image.histogram(), gray)


def prepare(
    preparation: Preparation, examples: Iterable[Example | Bad], *, num_threads: int
) -> Generator[Prepared | Bad, None, None]:
    """Every example prepared, in order, by ``num_threads`` threads; examples are taken and opened in the caller's."""
    found = map(preparation.open, examples)
    if num_threads == 1:
        yield from map(preparation, found)
        return
    pending, held = deque[tuple[Future[list[Prepared | Bad]], int]](), 0
    with ThreadPoolExecutor(num_threads, thread_name_prefix="titan_attent-images") as threads:
        try:
            for chunk, num_bytes in _chunks(found):
                while pending and (len(pending) > 3 * num_threads or held + num_bytes > num_threads * _THREAD_BYTES):
                    future, freed = pending.popleft()
                    yield from future.result()
                    del future
                    held -= freed
                pending.append((threads.submit(_prepare_all, preparation, chunk), num_bytes))
                held += num_bytes
            while pending:
                yield from pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


def _prepare_all(preparation: Preparation, chunk: list[Opened | Bad]) -> list[Prepared | Bad]:
    done: list[Prepared | Bad] = []
    chunk.reverse()
    while chunk:  # each is let go of once it is done
        done.append(preparation(chunk.pop()))
    return done


def _chunks(examples: Iterable[Opened | Bad]) -> Iterator[tuple[list[Opened | Bad], int]]:
    """Up to ``_CHUNK`` of them, or as many as have ``_CHUNK_BYTES``, and their bytes."""
    chunk: list[Opened | Bad] = []
    num_bytes = 0
    for example in examples:
        more = 0 if isinstance(example, Bad) else example.num_bytes
        if chunk and (len(chunk) == _CHUNK or num_bytes + more > _CHUNK_BYTES):
            yield chunk, num_bytes
            chunk, num_bytes = [], 0
        chunk.append(example)
        num_bytes += more
    if chunk:
        yield chunk, num_bytes
