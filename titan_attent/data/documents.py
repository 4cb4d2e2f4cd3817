"""Documents out of files: one JSON line, one parquet row or one text file each, in a fixed order.

The files, listed by inputs.py, are read as a stream. Every document comes with a cursor to what follows it, from
which reading can go on later without reading again what came before.

Cost: one document in memory, for parquet 1024 rows of one column.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from titan_attent.data.inputs import InputFile

ROWS_PER_READ = 1024


class Cursor(NamedTuple):
    """Where to read on: in file number ``file``, after ``row`` lines or rows and ``offset`` bytes."""

    file: int = 0
    row: int = 0
    offset: int = 0


START = Cursor()


class Document(NamedTuple):
    """``text`` is None for an optional file that is not text; ``num_bytes`` is what it takes in the file."""

    source: str
    text: str | None
    cursor: Cursor
    num_bytes: int


def read_documents(files: Sequence[InputFile], *, text_key: str, start: Cursor = START) -> Iterator[Document]:
    """The documents of ``files`` in order, from ``start`` on.

    Args:
        text_key: the key of a JSON line, or the column of a parquet file, that holds the text.

    Raises:
        ValueError: a record or file that cannot be read; names the file and the line or row.
    """
    for number in range(start.file, len(files)):
        at = start if number == start.file else Cursor(number)
        file = files[number]
        if file.extension in ("jsonl", "jsonl.gz"):
            yield from _read_jsonl(file, text_key=text_key, start=at)
        elif file.extension == "parquet":
            yield from _read_parquet(file, text_key=text_key, start=at)
        else:
            yield Document(file.source, _read_text(file), Cursor(number + 1), file.num_bytes)


def _read_text(file: InputFile) -> str | None:
    content = file.path.read_bytes()
    if file.optional and b"\0" in content:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if file.optional:
            return None
        raise ValueError(f"{file.path}: not UTF-8 ({error}); convert the file to UTF-8") from error


def _read_jsonl(file: InputFile, *, text_key: str, start: Cursor) -> Iterator[Document]:
    number, row, offset = start
    with open(file.path, "rb") as raw:
        lines: io.BufferedIOBase = gzip.open(raw) if file.extension == "jsonl.gz" else raw  # noqa: SIM115
        place = 0
        try:
            lines.seek(offset)
            for line in lines:
                row, offset = row + 1, offset + len(line)
                if line.strip():
                    text = _text_of_line(line, text_key=text_key, where=f"{file.path}:{row}")
                    # Of the file itself, compressed or not.
                    place, before = raw.tell(), place
                    yield Document(file.source, text, Cursor(number, row, offset), place - before)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{file.path}: damaged gzip file after line {row} ({error}); download or compress it again"
            ) from error


def _text_of_line(line: bytes, *, text_key: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: malformed JSON line ({error}); fix or remove the line") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__} where an object with the key {text_key!r} is "
            "expected; write one object a line"
        )
    if text_key not in record:
        raise ValueError(f"{where}: no key {text_key!r}; {_choose(record)}")
    return _check_text(record[text_key], text_key=text_key, where=where)


def _choose(names: Any) -> str:
    return f"name the one that holds the text with --text-key, of {', '.join(map(repr, names))}"


def _check_text(text: Any, *, text_key: str, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {text_key!r} is {type(text).__name__}, not a string; fix or remove the record, or "
            "choose another --text-key"
        )
    return text


def _read_parquet(file: InputFile, *, text_key: str, start: Cursor) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number, row, place = start.file, 0, 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            num_rows, names = table.metadata.num_rows, table.schema_arrow.names
            if text_key not in names:
                raise ValueError(f"{file.path}: no column {text_key!r}; {_choose(names)}")
            for group in range(table.num_row_groups):
                group_rows = table.metadata.row_group(group).num_rows
                if row + group_rows <= start.row:
                    row += group_rows
                    continue
                batches = table.iter_batches(ROWS_PER_READ, row_groups=[group], columns=[text_key])
                for batch in batches:
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row <= start.row:
                            continue
                        where = f"{file.path}: row {row}"
                        text = _check_text(value, text_key=text_key, where=where)
                        done = file.num_bytes * row // num_rows
                        yield Document(file.source, text, Cursor(number, row), done - place)
                        place = done
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.path}: damaged or not a parquet file ({error}); download or write it again") from error
