"""Reads documents from files: each JSON record, parquet row or text file is one document, in a fixed order.

The files, listed by inputs.py, are read as a stream. Every document has a cursor, the position after it, from which a
later run can continue. Only in a gzip file or a JSON array does that run read the earlier documents again.

Cost: memory for one document, or for parquet as in parquet_text.py.
"""

import gzip
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from titan_attent.data.io.bad import BINARY, DAMAGED, ENCODING, MALFORMED, NO_STRING, NO_TEXT, SIZE, Bad
from titan_attent.data.text.inputs import InputFile
from titan_attent.data.text.json_values import (
    GZIP_ERRORS,
    WIDE_BOMS,
    RepeatedKeyError,
    TooLargeError,
    decode_record,
    read_values,
)
from titan_attent.data.text.parquet_text import read_column

MAX_DOCUMENT_BYTES = 2**28
"""Default maximum size of a document and of a JSON line."""
UTF8_FIX = "convert the file to UTF-8"


class ReadPosition(NamedTuple):
    """The position to continue from: in file number ``file``, after ``row`` lines or rows and ``offset`` bytes."""

    file: int = 0
    row: int = 0
    offset: int = 0


START = ReadPosition()


class Document(NamedTuple):
    """One document, or an unusable record or file.

    Attributes:
        source: name of the data source.
        text: the document; None if it is unusable.
        cursor: the position after it.
        num_bytes: its size in the file on disk.
        bad: why it is unusable.
    """

    source: str
    text: str | None
    cursor: ReadPosition
    num_bytes: int
    bad: Bad | None = None


def read_documents(
    files: Sequence[InputFile],
    *,
    text_key: str,
    start: ReadPosition = START,
    skip: bool = False,
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document]:
    """The documents of ``files`` in order, from ``start`` on.

    Args:
        text_key: the key of a JSON record, or the column of a parquet file, that holds the text.
        skip: yield unusable records and files with ``text`` None and continue. Optional files that are not text are
            always skipped.
        max_bytes: maximum size of a document and of a JSON line.

    Raises:
        ValueError: a record or file is unusable and ``skip`` is false; the message names the file and the line or
            row.
    """
    for number in range(start.file, len(files)):
        file = files[number]
        at = start if number == start.file else ReadPosition(number)
        previous = 0
        for text, cursor, done in _read_file(file, at, text_key, max_bytes):
            if isinstance(text, Bad):
                if not (skip or (file.optional and file.kind == "text" and text.reason in (BINARY, ENCODING))):
                    raise ValueError(text.message())
                yield Document(file.source, None, cursor, done - previous, text)
            else:
                yield Document(file.source, text, cursor, done - previous)
            previous = done


Item = tuple[str | Bad, ReadPosition, int]
"""A text, the position after it, and the bytes of the file on disk up to that position."""


def _read_file(file: InputFile, at: ReadPosition, text_key: str, max_bytes: int) -> Iterator[Item]:
    next_file = ReadPosition(at.file + 1)
    if file.kind == "parquet":
        yield from _read_parquet(file, at, text_key, max_bytes)
        return
    if file.kind == "text":
        yield _read_text(file, max_bytes), next_file, file.num_bytes
        return
    with open(file.path, "rb") as raw:
        head = raw.read(4)
        raw.seek(0)
        if head.startswith(WIDE_BOMS):
            problem = "UTF-16 or UTF-32, by its byte-order mark, but JSON must be UTF-8"
            yield Bad(str(file.path), ENCODING, problem, UTF8_FIX), next_file, file.num_bytes
            return
        stream: Any = gzip.open(raw) if file.compressed else raw  # noqa: SIM115
        row = at.row
        try:
            read = _read_lines if file.kind == "lines" else _read_array
            for text, row, offset in read(file, stream, at, text_key, max_bytes):
                yield text, ReadPosition(at.file, row, offset), raw.tell()
        except GZIP_ERRORS as error:
            problem = f"damaged gzip file after {'line' if file.kind == 'lines' else 'record'} {row} ({error})"
            yield Bad(str(file.path), DAMAGED, problem, "download or compress it again"), next_file, file.num_bytes
        except ValueError as error:
            # Raised only for arrays: the records after a malformed one are lost, as the start of the next is unknown.
            too_large = isinstance(error, TooLargeError)
            problem = (
                f"record {row + 1} takes more than {max_bytes:,} bytes" if too_large else f"malformed JSON ({error})"
            )
            fix = "raise --max-document-bytes" if too_large else "fix the file, or write one object per line"
            problem += f" after record {row}" * (not too_large)
            yield Bad(str(file.path), SIZE if too_large else MALFORMED, problem, fix), next_file, file.num_bytes


def _read_text(file: InputFile, max_bytes: int) -> str | Bad:
    where = str(file.path)
    try:
        with gzip.open(file.path) if file.compressed else open(file.path, "rb") as stream:
            content = stream.read(max_bytes + 1) if file.compressed or file.num_bytes <= max_bytes else b""
    except GZIP_ERRORS as error:
        return Bad(where, DAMAGED, f"damaged gzip file ({error})", "download or compress it again")
    if len(content) > max_bytes or (file.num_bytes > max_bytes and not file.compressed):
        return Bad(where, SIZE, f"has more than {max_bytes:,} bytes", "split it, or raise --max-document-bytes")
    # A byte-order mark identifies the encoding, and is not part of the text. That of UTF-32 begins like that of UTF-16.
    wide = next((mark for mark in WIDE_BOMS if content.startswith(mark)), None)
    encoding = "utf-8-sig" if wide is None else "utf-32" if len(wide) == 4 else "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        return Bad(where, ENCODING, f"not {'UTF-8' if wide is None else encoding.upper()} ({error})", UTF8_FIX)
    if (index := text.find("\0")) >= 0:
        problem = f"holds a NUL at character {index:,}, as binary files and UTF-16 without a byte-order mark do"
        return Bad(where, BINARY, problem, f"{UTF8_FIX}, or remove it from the inputs")
    return text


def _read_lines(
    file: InputFile, stream: IO[bytes], at: ReadPosition, text_key: str, max_bytes: int
) -> Iterator[tuple[str | Bad, int, int]]:
    row, offset = at.row, at.offset
    stream.seek(offset)
    while line := stream.readline(max_bytes + 1):
        row, offset = row + 1, offset + len(line)
        where = f"{file.path}:{row}"
        if len(line) > max_bytes:
            while not line.endswith(b"\n") and (line := stream.readline(2**20)):
                offset += len(line)
            problem = f"this line has more than {max_bytes:,} bytes"
            yield Bad(where, SIZE, problem, "split its text, or raise --max-document-bytes"), row, offset
        elif line.strip():
            yield _text_of_line(line, text_key=text_key, where=where), row, offset


def _text_of_line(line: bytes, *, text_key: str, where: str) -> str | Bad:
    fix = "fix or remove the line"
    try:
        record = decode_record(line.decode("utf-8-sig"), text_key=text_key)
    except RecursionError:
        return Bad(where, MALFORMED, "malformed JSON line (nested too deeply)", fix)
    except RepeatedKeyError as error:
        return Bad(where, MALFORMED, str(error), fix)
    except ValueError as error:
        return Bad(where, MALFORMED, f"malformed JSON line ({error})", fix)
    return _text_of_record(record, text_key=text_key, where=where)


def _read_array(
    file: InputFile, stream: IO[bytes], at: ReadPosition, text_key: str, max_bytes: int
) -> Iterator[tuple[str | Bad, int, int]]:
    for row, record in enumerate(read_values(stream, text_key=text_key, max_bytes=max_bytes), start=1):
        if row > at.row:
            yield _text_of_record(record, text_key=text_key, where=f"{file.path}: record {row}"), row, 0


def _text_of_record(record: Any, *, text_key: str, where: str) -> str | Bad:
    if isinstance(record, RepeatedKeyError):
        return Bad(where, MALFORMED, str(record), "fix or remove the record")
    if not isinstance(record, dict):
        problem = f"a JSON {type(record).__name__} where an object with the key {text_key!r} is expected"
        return Bad(where, MALFORMED, problem, "write one object per line")
    if text_key not in record:
        return Bad(where, NO_TEXT, f"no key {text_key!r}", _choose(record))
    return _check_text(record[text_key], text_key=text_key, where=where)


def _choose(names: Any) -> str:
    shown = [repr(name)[:80] for name in names]
    return f"select the text with --text-key, one of {', '.join(shown[:40])}"


def _check_text(text: Any, *, text_key: str, where: str) -> str | Bad:
    if isinstance(text, str):
        return text
    problem = f"{text_key!r} is {type(text).__name__}, not a string"
    fix = "fix or remove the record, or choose another --text-key"
    return Bad(where, NO_TEXT if text is None else NO_STRING, problem, fix)


def _read_parquet(file: InputFile, at: ReadPosition, text_key: str, max_bytes: int) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    where, next_file = str(file.path), ReadPosition(at.file + 1)
    try:
        # The file is not mapped, and a column is read in blocks.
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=2**20) as table:
            num_rows, names = max(1, table.metadata.num_rows), table.schema_arrow.names
            if names.count(text_key) != 1:
                problem, fix = f"no column {text_key!r}", _choose(names)
                if text_key in names:
                    problem, fix = f"the column {text_key!r} appears twice", "write the file again with one of them"
                yield Bad(where, NO_TEXT, problem, fix), next_file, file.num_bytes
                return
            for row, value in read_column(file.path, table, column=text_key, start=at.row, max_bytes=max_bytes):
                row_name = f"{where}: row {row}"
                if isinstance(value, bytes):
                    text: str | Bad = Bad(row_name, ENCODING, f"{text_key!r} is not UTF-8", "fix or remove the row")
                else:
                    text = _check_text(value, text_key=text_key, where=row_name)
                if isinstance(text, str) and len(text) > max_bytes // 4 and len(text.encode()) > max_bytes:
                    problem, fix = f"more than {max_bytes:,} bytes of text", "split it, or raise --max-document-bytes"
                    text = Bad(row_name, SIZE, problem, fix)
                yield text, ReadPosition(at.file, row), file.num_bytes * row // num_rows
    except TooLargeError as error:
        yield Bad(where, SIZE, str(error), "split its texts, or raise --max-document-bytes"), next_file, file.num_bytes
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        problem = f"damaged or not a parquet file ({error})"
        yield Bad(where, DAMAGED, problem, "download or write it again"), next_file, file.num_bytes
