"""Text to train a tokenizer on: from all inputs alike, whatever order they are given in.

The files, in an order of their own, lie on a line by their sizes. It is cut into equal stretches, and each gives text
from its beginning, all of them as much: so a file gives text in proportion to its size, and a large one from many
places. Where a file cannot be entered anywhere (gzip, an array of JSON), its stretches follow each other from its
beginning; a table of parquet is entered at its row groups. Where there is less text than wanted, all of it is taken.

Cost: what is taken is read, and of a text file that is cut all of it; at most ``MAX_BLOCKS`` places are looked for.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from titan_attent.data.text.documents import Document, ReadPosition, read_documents
from titan_attent.data.text.inputs import InputFile
from titan_attent.data.text.tokenizer import well_formed

BLOCK = 2**18
"""Bytes of text that a stretch gives, where there are not too many of them."""
MAX_BLOCKS = 2**12
MOST_INFLATED = 8
"""Times as much text as bytes on disk: where that would fit, compressed files are not sampled but read."""


def sample_texts(files: Sequence[InputFile], *, num_bytes: int, text_key: str, max_bytes: int) -> Iterator[str]:
    """Texts of at most ``num_bytes`` in UTF-8, the same for every order of ``files``; what cannot be used is left out.

    Args:
        max_bytes: of a document.
    """
    files = sorted(files, key=_order)
    sizes = [file.num_bytes for file in files]
    packed = any(file.compressed or file.kind == "parquet" for file in files)
    starts, total = [0, *accumulate(sizes)], sum(sizes)
    whole = total * (MOST_INFLATED if packed else 1) <= num_bytes
    num_blocks = 1 if whole else max(1, min(MAX_BLOCKS, -(-num_bytes // BLOCK)))
    number, opened, left = -1, _Opened(), num_bytes
    for block in range(num_blocks):
        first, last = (total * (block + i) // num_blocks for i in range(2))
        # What earlier stretches had too little text for, later ones give.
        quota = left // (num_blocks - block)
        at = max(0, bisect_right(starts, first) - 1)
        while quota > 0 and at < len(files) and (starts[at] < last or not total):
            if at != number:
                opened.close()
                number, opened = at, _Opened(files[at], text_key, max_bytes)
            for text in opened.between(max(0, first - starts[at]), min(sizes[at], last - starts[at])):
                content = well_formed(text).encode("utf-8")[:quota]
                yield content.decode("utf-8", "ignore")
                quota, left = quota - len(content), left - len(content)
                if quota <= 0:
                    break
            at += 1
    opened.close()


def _order(file: InputFile) -> tuple[str, int, str]:
    """A place among all that is not the one it was given at; files of one kind do not lie together."""
    name = f"{file.path.name} {file.num_bytes}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).hexdigest(), file.num_bytes, str(file.path)


class _Opened:
    """A file that is read forward, entered where it can be. Positions are bytes of the file as it is on disk."""

    def __init__(self, file: InputFile | None = None, text_key: str = "", max_bytes: int = 0):
        self.file, self.text_key, self.max_bytes = file, text_key, max_bytes
        self._documents: Iterator[Document] | None = None
        self._position = self._read = 0
        self._text: str | None = None
        self._groups: list[int] | None = None

    def close(self) -> None:
        if self._documents is not None:
            self._documents.close()  # type: ignore[attr-defined]
            self._documents = None

    def _enter(self, cursor: ReadPosition, position: int) -> None:
        self.close()
        assert self.file is not None
        self._documents = read_documents(
            [self.file], text_key=self.text_key, start=cursor, skip=True, max_bytes=self.max_bytes
        )
        self._position, self._read = position, 0

    def between(self, start: int, stop: int) -> Iterator[str]:
        """Texts that begin between ``start`` and ``stop``, or of a text file what lies there."""
        assert self.file is not None
        if self.file.kind == "text":
            if self._text is None:
                self._enter(ReadPosition(), 0)
                assert self._documents is not None
                self._text = next(self._documents).text or ""
            size, length = max(1, self.file.num_bytes), len(self._text)
            yield self._text[length * start // size : length * stop // size]
            return
        if self._documents is None:
            self._enter(ReadPosition(), 0)
        if start > self._position:
            self._go_to(start)
        assert self._documents is not None
        # Of a gzip file the position runs ahead, by what is inflated at a time: at its end all is read.
        to_the_end = stop >= self.file.num_bytes
        while (to_the_end or self._position < stop) and (document := next(self._documents, None)) is not None:
            self._read += document.num_bytes  # the first has all in front of it
            self._position = self._read
            if document.text:
                yield document.text

    def _go_to(self, start: int) -> None:
        """Enter the file at ``start``, or before it; or stay where it is read."""
        assert self.file is not None
        if self.file.kind == "lines" and not self.file.compressed:
            with open(self.file.path, "rb") as file:
                file.seek(start - 1)
                while (line := file.readline(2**20)) and not line.endswith(b"\n"):
                    pass
                offset = file.tell()
            self._enter(ReadPosition(0, 0, offset), offset)
        elif self.file.kind == "parquet":
            if self._groups is None:
                self._groups = _first_rows(self.file)
            row = start * self._groups[-1] // max(1, self.file.num_bytes)
            row = self._groups[max(0, bisect_right(self._groups, row) - 1)]
            position = self.file.num_bytes * row // max(1, self._groups[-1])
            if position > self._position:
                self._enter(ReadPosition(0, row, 0), position)


def _first_rows(file: InputFile) -> list[int]:
    """The first row of every row group, and the number of rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file.path)
    except (pyarrow.ArrowException, OSError):
        return [0]
    return [0, *accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))]
