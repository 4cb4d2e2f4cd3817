"""The texts of a column of a parquet file, of whatever type, a bounded number of bytes at a time.

Rows are read so many at a time as keep them within ``READ_BYTES``, by what the file declares of its column. A
dictionary stores a text once for many rows, so that a file of a kilobyte may hold gigabytes: there no more rows are
read at a time than would keep within ``READ_BYTES`` if each had the whole dictionary.

Cost: ``READ_BYTES`` of memory, the largest document, or one page of data where that is larger (the format bounds a page
to 2 GiB).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_attent.data.text.json_values import TooLargeError

READ_BYTES = 2**26
MAX_ROWS = 1024


def read_column(path: Path, table: Any, *, column: str, start: int, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """Number (from 1 on) and value of every row behind the first ``start``.

    A value is str, None, bytes that are no UTF-8, or what a column of another type holds.

    Args:
        table: the open ``pyarrow.parquet.ParquetFile``.
        max_bytes: of a text; what the file declares, beyond ``READ_BYTES``, is checked before anything is read.

    Raises:
        TooLargeError: texts, or a dictionary of them, are larger.
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    paths = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
    place = next(i for i, path in enumerate(paths) if f"{path}.".startswith(f"{column}."))
    row = 0
    for group in range(table.num_row_groups):
        meta = table.metadata.row_group(group)
        if row + meta.num_rows <= start:
            row += meta.num_rows
            continue
        chunk = meta.column(place)
        each = chunk.total_uncompressed_size // max(1, meta.num_rows)
        dictionary = _dictionary_bytes(path, chunk) if chunk.has_dictionary_page else 0
        if max(each, dictionary) > (limit := max(max_bytes, READ_BYTES)):
            what = f"a dictionary of {dictionary:,}" if dictionary > limit else f"texts of {each:,}"
            raise TooLargeError(f"behind row {row:,} it declares {what} bytes, more than {limit:,}")
        num_rows = max(1, min(MAX_ROWS, READ_BYTES // max(1, each, dictionary)))
        for batch in table.iter_batches(num_rows, row_groups=[group], columns=[column]):
            for value in _values(batch.column(0)):
                row += 1
                if row > start:
                    yield row, value


def _dictionary_bytes(path: Path, chunk: Any) -> int:
    """Size of the dictionary, inflated: the second number of its page's header (thrift's compact protocol)."""
    declared, place = int(chunk.total_uncompressed_size), chunk.dictionary_page_offset
    if place is None or not 0 <= place < path.stat().st_size:
        return declared
    with open(path, "rb") as file:
        file.seek(place)
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
    # Of a header that is not as expected nothing is believed: it has all that the column declares.
    return numbers[1] if len(numbers) == 2 and numbers[1] >= 0 else declared


def _values(array: Any) -> list[Any]:
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:  # one of them is no UTF-8
        values = [_one(item) for item in array]
    return [_decoded(value) if isinstance(value, bytes) else value for value in values]


def _one(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return item.as_buffer().to_pybytes()


def _decoded(value: bytes) -> str | bytes:
    """Text that was written as bytes, as older writers do."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
