"""The formats, in an order that cannot mistake one for another: any bytes are bare tokens, so these come last."""

from pathlib import Path
from typing import Protocol

from titan_attent.data.formats import datatrove, litdata, llmc, mds, megatron, numpy_file, raw
from titan_attent.data.formats.token_file import Hints, TokenFile


class Format(Protocol):
    """A module of a format.

    Attributes:
        NAME, TITLE: its name in ``--format``, and in messages.
        COMPANIONS: endings of files that are read with its token files, or are of no interest.
    """

    NAME: str
    TITLE: str
    COMPANIONS: tuple[str, ...]

    def is_entry(self, path: Path) -> bool:
        """Whether ``path`` is the file by which the format is recognised: its index or its tokens."""

    def open_files(self, path: Path, hints: Hints) -> list[TokenFile]:
        """The token files that the entry ``path`` stands for. ValueError if its headers do not fit the files."""


FORMATS: dict[str, Format] = {
    module.NAME: module for module in (megatron, mds, litdata, llmc, datatrove, numpy_file, raw)
}
"""Name -> format."""
