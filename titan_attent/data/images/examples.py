"""What every kind of input gives: images with labels, one after the other, and word of those that are bad."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from titan_attent.data.io.bad import Bad
from titan_attent.data.io.walk import LeftOut

IMAGE_KEYS = ("image", "images", "img", "x", "data")
LABEL_KEYS = ("label", "labels", "y", "target", "targets")
"""Columns, arrays or keys that hold images and labels, where none are named."""

Label = int | str
"""The number or the name of a class."""

MAX_PIXELS = 2**27
"""Of an image, where nothing else is asked for: half a gigabyte once it is decoded."""
MAX_FILE_BYTES = 2**30


class Limits(NamedTuple):
    """What is looked at before anything is decoded, unpacked or read into memory."""

    pixels: int = MAX_PIXELS
    """Of an image, as its header or its array has them."""
    file_bytes: int = MAX_FILE_BYTES
    """Of the file of an image: what a folder, a tar member or a row of a table has of it."""


class Example(NamedTuple):
    """An image as the bytes of a file or as uint8 [H, W, C]; ``where`` tells a reader which one it is."""

    where: str
    image: bytes | np.ndarray
    label: Label


REASONS = ("undecodable", "label", "size", "damaged", "class", "large", "link", "name", "twice")
"""An image that cannot be read or decoded, has no (valid) label, or another size; a file that ends early; an empty
class; a file of an image of more bytes than are read; a member of a tar file that is a link, has several dots in its
name, or whose key or name stands there twice."""


class Input(Protocol):
    """An input of the writer."""

    @property
    def path(self) -> Path:
        """Of its file or folder."""

    @property
    def names(self) -> Sequence[str] | None:
        """Names of the classes, if the input has any."""

    @property
    def ordered(self) -> bool:
        """Whether their order numbers the classes; that of folders need not."""

    @property
    def holds_files(self) -> bool:
        """Whether images are bytes of files."""

    @property
    def left_out(self) -> LeftOut:
        """What it holds that is neither an example nor bad, counted once the examples were read."""

    @property
    def num_unread(self) -> int:
        """How many of these may be images."""

    @property
    def num_images(self) -> int | None:
        """Images, if that is known before they are read."""

    def examples(self) -> Iterator[Example | Bad]:
        """Streamed, in a fixed order."""

    def labels(self) -> Iterator[Label]:
        """The labels alone, where ``names`` is None; bad ones left out."""


def choose(names: Sequence[str], *, wanted: str | None, usual: Sequence[str], what: str, where: str) -> str:
    """``wanted``, or else the only one of ``usual`` in ``names``; ValueError if there is none, or several, or twice."""
    found = [name for name in ([wanted] if wanted else usual) if name in names]
    if len(found) != 1:
        problem = f"no {wanted!r}" if wanted else f"none of {', '.join(usual)}" if not found else f"both {found}"
        raise ValueError(
            f"{where}: {problem} for the {what}; name those that hold images and labels with --keys IMAGE,LABEL, of "
            f"{', '.join(names)}"
        )
    if names.count(found[0]) > 1:
        raise ValueError(
            f"{where}: {found[0]!r} stands {names.count(found[0])} times in it, and which of them holds the {what} is "
            "not clear; write it again with names that differ"
        )
    return found[0]
