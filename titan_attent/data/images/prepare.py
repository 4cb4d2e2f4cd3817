"""What the writer does to every image: decode, check, resize; by several threads, in order.

Cost: 64 images a thread in memory.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from titan_attent.data.images.classes import Classes
from titan_attent.data.images.examples import Bad, Example
from titan_attent.data.images.pictures import FILE_FORMATS, decode, from_array, square

_CHUNK = 16
"""Images that a thread takes at a time."""


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
    """From an image as it was found to what is written of it.

    Attributes:
        encoding: "raw" or "file".
        channels: 1 or 3.
        size: side of the centre square, 0 to leave the image as it is.
    """

    classes: Classes
    encoding: str
    channels: int
    size: int

    def __call__(self, example: Example | Bad) -> Prepared | Bad:
        if isinstance(example, Bad):
            return example
        where, stored, found = example
        try:
            label = self.classes.number(found)
        except ValueError as error:
            return Bad(where, "label", str(error), "correct it, or the list of classes")
        kind = ""
        try:
            if isinstance(stored, bytes):
                image, kind, gray = decode(stored, channels=self.channels)
            else:
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
    call: Callable[[Example | Bad], Prepared | Bad], examples: Iterable[Example | Bad], *, num_threads: int
) -> Generator[Prepared | Bad, None, None]:
    """``call`` of every example, in order, by ``num_threads`` threads; examples are taken in the caller's."""
    if num_threads == 1:
        yield from map(call, examples)
        return
    examples, pending = iter(examples), deque[Future[list[Prepared | Bad]]]()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="titan_attent-images") as threads:
        try:
            while chunk := list(islice(examples, _CHUNK)):
                pending.append(threads.submit(lambda chunk: [call(example) for example in chunk], chunk))
                if len(pending) > 3 * num_threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
