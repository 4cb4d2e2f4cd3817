"""Reads the records of a .csv or .tsv file; the first record is the header, which names the columns.

The dialect is that of RFC 4180, which spreadsheets, pandas and ``datasets.to_csv`` write: commas (tabs in .tsv) between
fields, and fields in double quotes, which may hold line ends and quotes written twice. A record of another number of
fields than the header is unusable, and so is one that is not UTF-8. Where the quotes are wrong, the start of the next
record is unknown, and the rest of the file is lost.

Cost: memory for one record. A run continues at the position after any record; it reads the header again.
"""

import csv
from collections.abc import Iterator
from typing import IO, NamedTuple

from titan_attent.data.io.bad import DAMAGED, ENCODING, MALFORMED, SIZE, Bad
from titan_attent.data.text.records import Content, Records

DELIMITERS = {"csv": ",", "tsv": "\t"}
"""By extension."""


class UnusableFileError(ValueError):
    """Nothing more of a file can be used; ``bad`` says why."""

    def __init__(self, bad: Bad):
        super().__init__(bad.message())
        self.bad = bad


class Row(NamedTuple):
    """The fields of a record, which begins in line ``line``; ``row`` lines and ``offset`` bytes end with it."""

    fields: list[str]
    line: int
    row: int
    offset: int
    is_utf8: bool


def read_table(
    stream: IO[bytes], *, path: str, delimiter: str, row: int, offset: int, records: Records, max_bytes: int
) -> Iterator[tuple[Content | Bad, int, int]]:
    """Yield the content of every record, and the number of lines and of bytes up to its end.

    Args:
        path: name of the file, for messages.
        row, offset: the position after an earlier record, from which to continue; 0 for the beginning.
        max_bytes: maximum size of a record.

    Raises:
        UnusableFileError: the header lacks a column, a record is too large, or its quotes are wrong.
    """
    header = next(_read_rows(stream, path=path, delimiter=delimiter, max_bytes=max_bytes), None)
    if header is None:
        return
    unusable = records.unusable_columns(header.fields, where=path) if header.is_utf8 else _not_utf8(path, header)
    if unusable is not None:
        raise UnusableFileError(unusable)
    columns = [header.fields.index(name) for name in records.names]
    row, offset = max(row, header.row), max(offset, header.offset)
    for one in _read_rows(stream, path=path, delimiter=delimiter, row=row, offset=offset, max_bytes=max_bytes):
        if not one.is_utf8:
            content: Content | Bad = _not_utf8(path, one)
        elif len(one.fields) != len(header.fields):
            problem = f"{len(one.fields)} fields where the header has {len(header.fields)}"
            content = Bad(f"{path}:{one.line}", MALFORMED, problem, "fix or remove the record")
        else:
            content = records.content([one.fields[column] for column in columns], where=f"{path}:{one.line}")
        yield content, one.row, one.offset


def _not_utf8(path: str, row: Row) -> Bad:
    return Bad(f"{path}:{row.line}", ENCODING, "the record is not UTF-8", "convert the file to UTF-8")


def _read_rows(
    stream: IO[bytes], *, path: str, delimiter: str, row: int = 0, offset: int = 0, max_bytes: int
) -> Iterator[Row]:
    line, num_bytes, is_utf8 = row + 1, 0, True

    def decoded_lines() -> Iterator[str]:
        nonlocal row, offset, num_bytes, is_utf8
        while content := stream.readline(max_bytes + 1 - num_bytes):
            row, offset, num_bytes = row + 1, offset + len(content), num_bytes + len(content)
            if num_bytes > max_bytes:
                problem = f"the record takes more than {max_bytes:,} bytes; the file is not read beyond it"
                fix = "close its quotes, split its text, or raise --max-document-bytes"
                raise UnusableFileError(Bad(f"{path}:{line}", SIZE, problem, fix))
            encoding = "utf-8-sig" if row == 1 else "utf-8"
            try:
                yield content.decode(encoding)
            except UnicodeDecodeError:
                is_utf8 = False
                yield content.decode(encoding, "surrogateescape")  # quotes and delimiters stay where they are

    # The module's own limit is 128 KiB per field, and for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    stream.seek(offset)
    try:
        for fields in csv.reader(decoded_lines(), delimiter=delimiter, strict=True):
            if fields:  # none for an empty line
                yield Row(fields, line, row, offset, is_utf8)
            line, num_bytes, is_utf8 = row + 1, 0, True
    except csv.Error as error:
        problem = f"wrong quotes or line ends ({error}); the file is not read beyond them"
        fix = "write quotes inside of a quoted field twice, and close the field"
        raise UnusableFileError(Bad(f"{path}:{line}", DAMAGED, problem, fix)) from None
