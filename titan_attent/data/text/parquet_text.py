"""Reads columns of any type in a parquet file, with bounded memory.

Rows are read in batches of at most ``READ_BYTES``, by the sizes that the file declares for its columns. A dictionary
stores a text once for many rows, so that a file of 1 KB can hold gigabytes of text. So the size of a batch is computed
as if each of its rows had the whole dictionary. A row of a list (messages) counts as the mean number of values per row
of its row group; a file with all values in one row may take more memory.

Cost: memory of the largest of ``READ_BYTES``, one document, and one page of data (at most 2 GiB by the format).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_attent.data.text.json_values import TooLargeError

READ_BYTES = 2**26
MAX_ROWS = 1024


def read_columns(
    path: Path, table: Any, *, columns: Sequence[str], start: int, max_bytes: int
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number (from 1) and the values, one per column, of every row after the first ``start`` rows.

    A value is str, None, bytes that are not UTF-8, or a value of another type for a column of another type.

    Args:
        table: the open ``pyarrow.parquet.ParquetFile``.
        max_bytes: maximum size of a text. Declared sizes may not exceed the larger of it and ``READ_BYTES``; this is
            checked before anything is read.

    Raises:
        TooLargeError: the declared size of texts, or of their dictionary, is larger.
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    paths = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
    # A column of a nested type, such as a list of messages, is stored as several.
    indices = [i for i, path in enumerate(paths) if any(f"{path}.".startswith(f"{column}.") for column in columns)]
    row = 0
    for group in range(table.num_row_groups):
        meta = table.metadata.row_group(group)
        if row + meta.num_rows <= start:
            row += meta.num_rows
            continue
        chunks = [meta.column(index) for index in indices]
        each = sum(chunk.total_uncompressed_size for chunk in chunks) // max(1, meta.num_rows)
        dictionary = sum(
            _dictionary_bytes(path, chunk) * -(-chunk.num_values // max(1, meta.num_rows))
            for chunk in chunks
            if chunk.has_dictionary_page
        )
        if max(each, dictionary) > (limit := max(max_bytes, READ_BYTES)):
            declared = f"a dictionary of {dictionary:,}" if dictionary > limit else f"texts of {each:,}"
            raise TooLargeError(f"after row {row:,} the file declares {declared} bytes, more than {limit:,}")
        num_rows = max(1, min(MAX_ROWS, READ_BYTES // max(1, each, dictionary)))
        for batch in table.iter_batches(num_rows, row_groups=[group], columns=list(columns)):
            for values in zip(*(_values(batch.column(column)) for column in columns), strict=True):
                row += 1
                if row > start:
                    yield row, values


def _dictionary_bytes(path: Path, chunk: Any) -> int:
    """Uncompressed size of the dictionary: the second number in the header of its page (thrift's compact protocol)."""
    declared, offset = int(chunk.total_uncompressed_size), chunk.dictionary_page_offset
    if offset is None or not 0 <= offset < path.stat().st_size:
        return declared
    with open(path, "rb") as file:
        file.seek(offset)
        header = file.read(32)
    numbers: list[int] = []
    at = 0
    while len(numbers) < 2 and at < len(header) and header[at] == 0x15:  # the next field, an int32
        at += 1
        number = shift = 0
        while at < len(header):
            byte = header[at]
            number, shift, at = number | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                break
        numbers.append(number >> 1 ^ -(number & 1))
    # If the header is not as expected, use an upper limit: the size of the whole column.
    return numbers[1] if len(numbers) == 2 and numbers[1] >= 0 else declared


def _values(array: Any) -> list[Any]:
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:  # one of them is not UTF-8
        values = [_text_or_bytes(item) for item in array]
    return [_decoded(value) if isinstance(value, bytes) else value for value in values]


def _text_or_bytes(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return item.as_buffer().to_pybytes() if hasattr(item, "as_buffer") else b"\xff"  # a list or struct


def _decoded(value: bytes) -> str | bytes:
    """Decode text that an older writer stored as bytes; other bytes are returned unchanged."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
