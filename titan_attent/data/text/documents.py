"""Reads documents from files: each JSON record, parquet row or text file is one document, in a fixed order.

The files, listed by inputs.py, are read as a stream. Every document has a cursor, the position after it, from which a
later run can continue. Only in a compressed file or a JSON list does that run read the earlier documents again.

Cost: memory for one document, or as in parquet_text.py and arrow_text.py.
"""

from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from titan_attent.data.io.bad import BINARY, DAMAGED, ENCODING, MALFORMED, NO_TEXT, SIZE, Bad
from titan_attent.data.io.remote import RemoteError
from titan_attent.data.text.arrow_text import ArrowRows
from titan_attent.data.text.compressed import DAMAGE_ERRORS, bare_extension, decompressed
from titan_attent.data.text.csv_text import DELIMITERS, UnusableFileError, read_table
from titan_attent.data.text.inputs import InputFile
from titan_attent.data.text.json_values import (
    WIDE_BOMS,
    NoListError,
    RepeatedKeyError,
    TooLargeError,
    decode_record,
    read_values,
)
from titan_attent.data.text.parquet_text import ParquetRows
from titan_attent.data.text.records import Content, Records, Segment

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
        segments: the segments of ``text``, if some of it does not count as labels (records.py).
    """

    source: str
    text: str | None
    cursor: ReadPosition
    num_bytes: int
    bad: Bad | None = None
    segments: tuple[Segment, ...] = ()


def read_documents(
    files: Sequence[InputFile],
    *,
    records: Records,
    start: ReadPosition = START,
    skip: bool = False,
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document]:
    """The documents of ``files`` in order, from ``start`` on.

    Args:
        records: the keys of a JSON record, or the columns of a table, that hold the text.
        skip: yield unusable records and files with ``text`` None and continue. Optional files that are not text are
            always skipped.
        max_bytes: maximum size of a document, of a JSON line and of a csv record.

    Raises:
        ValueError: a record or file is unusable and ``skip`` is false; the message names the file and the line or
            row.
    """
    for number in range(start.file, len(files)):
        file = files[number]
        at = start if number == start.file else ReadPosition(number)
        previous = 0
        for content, cursor, done in _read_file(file, at, records.of(file.source), max_bytes):
            if isinstance(content, Bad):
                if not (skip or (file.optional and file.kind == "text" and content.reason in (BINARY, ENCODING))):
                    raise ValueError(content.message())
                yield Document(file.source, None, cursor, done - previous, content)
            elif isinstance(content, str):
                yield Document(file.source, content, cursor, done - previous)
            else:
                yield Document(file.source, _joined(content), cursor, done - previous, None, content)
            previous = done


def _joined(content: Content) -> str:
    return content if isinstance(content, str) else "".join(segment.text for segment in content)


Item = tuple[Content | Bad, ReadPosition, int]
"""The content of a document, the position after it, and the bytes of the file on disk up to that position."""


def _read_file(file: InputFile, at: ReadPosition, records: Records, max_bytes: int) -> Iterator[Item]:
    next_file = ReadPosition(at.file + 1)
    if file.kind in _COLUMN_READERS:
        yield from _read_columns(file, at, records, max_bytes)
        return
    if file.kind == "text" and records.needs_keys:
        problem = f"is a text, not records with {' and '.join(map(repr, records.names))}"
        fix = "give .jsonl, .json, .parquet or .csv files, or leave out the options of these keys"
        if not records.has_mask:
            fix = "give the template to the source of the records only, --template NAME=TEMPLATE"
        yield Bad(str(file.path), NO_TEXT, problem, fix), next_file, file.num_bytes
        return
    if file.kind == "text":
        yield _read_text(file, max_bytes), next_file, file.num_bytes
        return
    with file.path.open("rb") as raw:
        head = raw.read(4)
        raw.seek(0)
        if head.startswith(WIDE_BOMS):
            problem = "UTF-16 or UTF-32, by its byte-order mark, but records must be UTF-8"
            yield Bad(str(file.path), ENCODING, problem, UTF8_FIX), next_file, file.num_bytes
            return
        stream = decompressed(raw, compression=file.compression)
        row = at.row
        try:
            for content, row, offset in _STREAM_READERS[file.kind](file, stream, at, records, max_bytes):
                yield content, ReadPosition(at.file, row, offset), raw.tell()
        except DAMAGE_ERRORS as error:
            unit = "record" if file.kind == "values" else "line"
            problem = f"damaged {file.packing} file after {unit} {row} ({error})"
            yield Bad(str(file.path), DAMAGED, problem, "download or compress it again"), next_file, file.num_bytes
        except UnusableFileError as error:
            yield error.bad, next_file, file.num_bytes
        except NoListError as error:
            fix = "choose another --records-key, or leave this option out"
            yield Bad(str(file.path), NO_TEXT, str(error), fix), next_file, file.num_bytes
        except RemoteError:
            raise
        except ValueError as error:
            # Raised only for lists: the records after a malformed one are lost, as the start of the next is unknown.
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
        with file.path.open("rb") as raw, decompressed(raw, compression=file.compression) as stream:
            content = stream.read(max_bytes + 1) if file.compression or file.num_bytes <= max_bytes else b""
    except DAMAGE_ERRORS as error:
        return Bad(where, DAMAGED, f"damaged {file.packing} file ({error})", "download or compress it again")
    if len(content) > max_bytes or (file.num_bytes > max_bytes and not file.compression):
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
    file: InputFile, stream: IO[bytes], at: ReadPosition, records: Records, max_bytes: int
) -> Iterator[tuple[Content | Bad, int, int]]:
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
            yield _content_of_line(line, records=records, where=where), row, offset


def _content_of_line(line: bytes, *, records: Records, where: str) -> Content | Bad:
    fix = "fix or remove the line"
    try:
        record = decode_record(line.decode("utf-8-sig"), keys=records.names)
    except RecursionError:
        return Bad(where, MALFORMED, "malformed JSON line (nested too deeply)", fix)
    except RepeatedKeyError as error:
        return Bad(where, MALFORMED, str(error), fix)
    except ValueError as error:
        return Bad(where, MALFORMED, f"malformed JSON line ({error})", fix)
    return _content_of_record(record, records=records, where=where)


def _read_array(
    file: InputFile, stream: IO[bytes], at: ReadPosition, records: Records, max_bytes: int
) -> Iterator[tuple[Content | Bad, int, int]]:
    options: dict[str, Any] = {"list_key": records.list_key, "max_bytes": max_bytes}
    for row, record in enumerate(read_values(stream, keys=records.names, **options), start=1):
        if row > at.row:
            yield _content_of_record(record, records=records, where=f"{file.path}: record {row}"), row, 0


def _read_table(
    file: InputFile, stream: IO[bytes], at: ReadPosition, records: Records, max_bytes: int
) -> Iterator[tuple[Content | Bad, int, int]]:
    delimiter = DELIMITERS[bare_extension(file.extension)]
    position = {"row": at.row, "offset": at.offset}
    return read_table(
        stream, path=str(file.path), delimiter=delimiter, records=records, max_bytes=max_bytes, **position
    )


_STREAM_READERS = {"lines": _read_lines, "values": _read_array, "table": _read_table}
"""By the kind of file: what reads its records from a stream of bytes."""


def _content_of_record(record: Any, *, records: Records, where: str) -> Content | Bad:
    if isinstance(record, RepeatedKeyError):
        return Bad(where, MALFORMED, str(record), "fix or remove the record")
    if not isinstance(record, dict):
        keys = " and ".join(f"the key {key!r}" for key in records.names)
        problem = f"a JSON {type(record).__name__} where an object with {keys} is expected"
        return Bad(where, MALFORMED, problem, "write one object per line")
    missing = records.missing(record, where=where, kind="key")
    if missing and (key := _key_of_list(record)):
        fix = f"{missing.fix}, or, of a .json file, read its list of records with --records-key {key}"
        return missing._replace(fix=fix)
    return missing or records.content([record[key] for key in records.names], where=where)


def _key_of_list(record: dict[str, Any]) -> str:
    """The first key of a list of objects; "" if there is none."""
    lists = ((key, value) for key, value in record.items() if isinstance(value, list))
    return next((key for key, value in lists if value and isinstance(value[0], dict)), "")


_COLUMN_READERS: dict[str, type[ParquetRows] | type[ArrowRows]] = {"parquet": ParquetRows, "arrow": ArrowRows}
"""By the kind of file: what reads its columns."""


def _read_columns(file: InputFile, at: ReadPosition, records: Records, max_bytes: int) -> Iterator[Item]:
    import pyarrow

    where, next_file = str(file.path), ReadPosition(at.file + 1)
    kind = _COLUMN_READERS[file.kind]
    try:
        with kind(file.path, num_bytes=file.num_bytes) as table:
            unusable = records.unusable_columns(table.names, where=where)
            if unusable is not None:
                yield unusable, next_file, file.num_bytes
                return
            for row, values, done in table.rows(records.names, start=at.row, max_bytes=max_bytes):
                content = _content_of_row(values, records=records, max_bytes=max_bytes, where=f"{where}: row {row}")
                yield content, ReadPosition(at.file, row), done
    except TooLargeError as error:
        yield Bad(where, SIZE, str(error), "split its texts, or raise --max-document-bytes"), next_file, file.num_bytes
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        problem = f"damaged or not {kind.noun} ({error})"
        yield Bad(where, DAMAGED, problem, "download or write it again"), next_file, file.num_bytes


def _content_of_row(values: Sequence[Any], *, records: Records, max_bytes: int, where: str) -> Content | Bad:
    not_utf8 = [key for key, value in zip(records.names, values, strict=True) if isinstance(value, bytes)]
    if not_utf8:
        return Bad(where, ENCODING, f"{not_utf8[0]!r} is not UTF-8", "fix or remove the row")
    content = records.content(values, where=where)
    if not isinstance(content, Bad):
        text = _joined(content)
        if len(text) > max_bytes // 4 and len(text.encode()) > max_bytes:
            problem = f"more than {max_bytes:,} bytes of text"
            return Bad(where, SIZE, problem, "split it, or raise --max-document-bytes")
    return content
