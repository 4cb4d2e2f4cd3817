"""The interface of all inputs: a stream of images with labels, and of records of images that cannot be used."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from titan_attent.data.io.bad import Bad
from titan_attent.data.io.walk import LeftOut

IMAGE_KEYS = ("image", "images", "img", "x", "data")
LABEL_KEYS = ("label", "labels", "y", "target", "targets")
"""Default names of the columns, arrays or keys that hold images and labels."""

Label = int | str
"""The index or the name of a class."""

MAX_PIXELS = 2**27
"""Default limit of the pixels of an image: 512 MiB once it is decoded."""
MAX_FILE_BYTES = 2**30


class Limits(NamedTuple):
    """Limits that are checked before an image is decoded, unpacked or read into memory."""

    pixels: int = MAX_PIXELS
    """Largest number of pixels of an image, according to its header or its array."""
    file_bytes: int = MAX_FILE_BYTES
    """Largest image file in bytes, whether in a folder, a tar file or a table."""


class Example(NamedTuple):
    """An image, as the bytes of a file or as uint8 [H, W, C]; ``where`` identifies it in messages."""

    where: str
    image: bytes | np.ndarray
    label: Label


REASONS = ("undecodable", "label", "size", "damaged", "class", "large", "link", "name", "twice")
"""Reasons why an image is bad, in this order: it cannot be read or decoded; it has no (valid) label; its size differs;
its input file is damaged; its class is empty; its file is above the limit. For members of a tar file: it is a link; its
name has several dots; its key or name appears twice."""


class Input(Protocol):
    """An input of the writer."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def names(self) -> Sequence[str] | None:
        """Names of the classes, None if the input has none."""

    @property
    def ordered(self) -> bool:
        """Whether the order of ``names`` defines the class indices; the order of folders does not."""

    @property
    def holds_files(self) -> bool:
        """Whether images are bytes of files rather than arrays."""

    @property
    def left_out(self) -> LeftOut:
        """Counts of files that are neither examples nor bad. Complete once the examples have been read."""

    @property
    def num_unread(self) -> int:
        """Number of left-out files that may be images."""

    @property
    def num_images(self) -> int | None:
        """Number of images, None if it is unknown before they are read."""

    def examples(self) -> Iterator[Example | Bad]:
        """Stream the examples in a fixed order."""

    def labels(self) -> Iterator[Label]:
        """The labels only, without bad ones; used if ``names`` is None."""


def choose_key(names: Sequence[str], *, requested: str | None, defaults: Sequence[str], role: str, where: str) -> str:
    """The requested name, or else the only one of ``defaults`` in ``names``.

    Args:
        names: names of the columns or arrays of a file.
        role: what the key holds, for messages: "images".
        where: the file, for messages.

    Raises:
        ValueError: no name matches, several match, or the match appears twice in ``names``.
    """
    matches = [name for name in ([requested] if requested else defaults) if name in names]
    if len(matches) != 1:
        none = f"no {requested!r}" if requested else f"none of {', '.join(defaults)}"
        raise ValueError(
            f"{where}: {f'both {matches}' if matches else none} for the {role}; choose the names of images and labels "
            f"with --keys IMAGE,LABEL, from {', '.join(names)}"
        )
    (match,) = matches
    if names.count(match) > 1:
        raise ValueError(
            f"{where}: {match!r} appears {names.count(match)} times in it, so which one holds the {role} is ambiguous; "
            "write the file again with distinct names"
        )
    return match
