"""Samples text from all inputs to train a tokenizer on, independent of the order of the inputs.

Each data source gives text in proportion to its size, and at least ``SPAN_BYTES``, if it has as much. The files of a
source, in a hashed order, are joined into one range of bytes, which is cut into equal spans. Every span gives an
equal quota of text, from its beginning. So a file gives text in proportion to its size, and a large file from many
positions. A file without random access (compressed, a JSON list, Arrow) is read from its beginning, one quota after the
other. A parquet file is entered at its row groups. If all inputs have less text than requested, all of it is taken.

Cost: one read of the sampled text; a text file is read whole; at most ``MAX_SPANS`` positions are looked up.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from titan_attent.data.text.documents import Document, ReadPosition, read_documents
from titan_attent.data.text.inputs import InputFile
from titan_attent.data.text.parquet_text import ParquetRows
from titan_attent.data.text.records import TEXT_RECORDS, Records
from titan_attent.data.text.tokenizer import well_formed

SPAN_BYTES = 2**18
"""Bytes of text per span, while there are fewer than ``MAX_SPANS`` spans."""
MAX_SPANS = 2**12
MAX_INFLATION = 8
"""Assumed maximum ratio of text to bytes on disk. If the text fits at this ratio, compressed files are read whole."""


def sample_texts(
    files: Sequence[InputFile],
    *,
    num_bytes: int,
    records: Records,
    max_bytes: int,
    excluded: Callable[[str], bool] | None = None,
) -> Iterator[str]:
    """Yield texts of at most ``num_bytes`` in UTF-8, equal for every order of ``files``; unusable records are left out.

    Args:
        max_bytes: maximum size of a document.
        excluded: whether a document, given by its text, is left out, too.
    """
    by_source: dict[str, list[InputFile]] = {}
    for file in files:
        by_source.setdefault(file.source, []).append(file)
    sizes = {source: sum(file.num_bytes for file in group) for source, group in by_source.items()}
    remaining, size = num_bytes, sum(sizes.values())
    # From the smallest to the largest, so that what a small source lacks goes to the others.
    for i, source in enumerate(sorted(by_source, key=lambda source: (sizes[source], source))):
        least = min(SPAN_BYTES, remaining // (len(by_source) - i))
        quota = max(least, remaining * sizes[source] // max(1, size)) if i < len(by_source) - 1 else remaining
        for text in _sample_source(
            by_source[source], num_bytes=quota, records=records, max_bytes=max_bytes, excluded=excluded
        ):
            remaining -= len(text.encode("utf-8"))
            yield text
        size -= sizes[source]


def _sample_source(
    files: Sequence[InputFile],
    *,
    num_bytes: int,
    records: Records,
    max_bytes: int,
    excluded: Callable[[str], bool] | None,
) -> Iterator[str]:
    files = sorted(files, key=_order)
    sizes = [file.num_bytes for file in files]
    packed = any(file.compression or file.kind in ("parquet", "arrow") for file in files)
    starts, total = [0, *accumulate(sizes)], sum(sizes)
    whole = total * (MAX_INFLATION if packed else 1) <= num_bytes
    num_spans = 1 if whole else max(1, min(MAX_SPANS, -(-num_bytes // SPAN_BYTES)))
    number, opened, remaining = -1, _Opened(), num_bytes
    for span in range(num_spans):
        first, last = (total * (span + i) // num_spans for i in range(2))
        # If an earlier span had too little text, later ones give more.
        quota = remaining // (num_spans - span)
        at = max(0, bisect_right(starts, first) - 1)
        while quota > 0 and at < len(files) and (starts[at] < last or not total):
            if at != number:
                opened.close()
                number, opened = at, _Opened(files[at], records, max_bytes, excluded)
            for text in opened.between(max(0, first - starts[at]), min(sizes[at], last - starts[at])):
                content = well_formed(text).encode("utf-8")[:quota]
                yield content.decode("utf-8", "ignore")
                quota, remaining = quota - len(content), remaining - len(content)
                if quota <= 0:
                    break
            at += 1
    opened.close()


def _order(file: InputFile) -> tuple[str, int, str]:
    """A sort key independent of the input order; it is hashed, so that similar files are not adjacent."""
    name = f"{file.path.name} {file.num_bytes}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).hexdigest(), file.num_bytes, str(file.path)


class _Opened:
    """A file that is read forward, from any position it can be entered at. Positions are bytes of the file on disk."""

    def __init__(
        self,
        file: InputFile | None = None,
        records: Records = TEXT_RECORDS,
        max_bytes: int = 0,
        excluded: Callable[[str], bool] | None = None,
    ):
        self.file, self.records, self.max_bytes = file, records, max_bytes
        self.excluded = excluded or (lambda text: False)
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
            [self.file], records=self.records, start=cursor, skip=True, max_bytes=self.max_bytes
        )
        self._position, self._read = position, 0

    def between(self, start: int, stop: int) -> Iterator[str]:
        """Yield the texts that begin in [``start``, ``stop``), or for a text file its characters there."""
        assert self.file is not None
        if self.file.kind == "text":
            if self._text is None:
                self._enter(ReadPosition(), 0)
                assert self._documents is not None
                self._text = next(self._documents).text or ""
                if self.excluded(self._text):
                    self._text = ""
            size, length = max(1, self.file.num_bytes), len(self._text)
            yield self._text[length * start // size : length * stop // size]
            return
        if self._documents is None:
            self._enter(ReadPosition(), 0)
        if start > self._position:
            self._go_to(start)
        assert self._documents is not None
        # In a gzip file the position runs ahead by one buffer; so at the end of the file, read all that is left.
        to_the_end = stop >= self.file.num_bytes
        while (to_the_end or self._position < stop) and (document := next(self._documents, None)) is not None:
            self._read += document.num_bytes  # the first has the bytes before it, too
            self._position = self._read
            if document.text and not self.excluded(document.text):
                yield document.text

    def _go_to(self, start: int) -> None:
        """Enter the file at or before ``start``; stay at the current position if the file cannot be entered there."""
        assert self.file is not None
        if self.file.kind == "lines" and not self.file.compression:
            with self.file.path.open("rb") as file:
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
    """The first row of every row group of a parquet file, then the number of rows; [0] of a damaged one."""
    import pyarrow

    try:
        with ParquetRows(file.path, num_bytes=file.num_bytes) as table:
            return table.first_rows()
    except (pyarrow.ArrowException, OSError):
        return [0]
