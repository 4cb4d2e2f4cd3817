"""Reads columns of any type in a parquet file, with bounded memory.

Rows are read in batches of at most ``READ_BYTES``, by the sizes that the file declares for its columns. A dictionary
stores a text once for many rows, so that a file of 1 KB can hold gigabytes of text. So the size of a batch is computed
as if each of its rows had the whole dictionary. A row of a list (messages) counts as the mean number of values per row
of its row group; a file with all values in one row may take more memory.

A remote file is read where its columns are, so its server must give parts of files.

Cost: memory of the largest of ``READ_BYTES``, one document, and one page of data (at most 2 GiB by the format).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from titan_attent.data.io.remote import InputPath
from titan_attent.data.text.column_values import decoded, text_or_bytes
from titan_attent.data.text.json_values import TooLargeError

READ_BYTES = 2**26
MAX_ROWS = 1024


class ParquetRows:
    """An open parquet file.

    Attributes:
        names: of its columns.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged.
    """

    noun = "a parquet file"

    def __init__(self, path: InputPath, *, num_bytes: int):
        import pyarrow.parquet

        self._num_bytes = num_bytes
        with ExitStack() as stack:
            # The file is not mapped, and a column is read in blocks.
            source = path if isinstance(path, Path) else stack.enter_context(path.open("rb", parts=True))
            self._table = stack.enter_context(pyarrow.parquet.ParquetFile(source, buffer_size=2**20))
            self._headers: IO[bytes] = stack.enter_context(
                path.open("rb") if isinstance(path, Path) else path.open("rb", parts=True)
            )
            self._stack = stack.pop_all()
        self.names: list[str] = self._table.schema_arrow.names

    def __enter__(self) -> "ParquetRows":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def first_rows(self) -> list[int]:
        """The first row of every row group, then the number of rows."""
        metadata = self._table.metadata
        return [0, *accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))]

    def rows(self, columns: Sequence[str], *, start: int, max_bytes: int) -> Iterator[tuple[int, tuple[Any, ...], int]]:
        """Yield the number (from 1) and the values of every row after the first ``start``, and the bytes up to it.

        A value is str, None, bytes that are not UTF-8, or a value of another type for a column of another type.

        Args:
            max_bytes: maximum size of a text. Declared sizes may not exceed the larger of it and ``READ_BYTES``; this
                is checked before anything is read.

        Raises:
            TooLargeError: the declared size of texts, or of their dictionary, is larger.
            pyarrow.ArrowException, OSError: the file is damaged.
        """
        table, metadata = self._table, self._table.metadata
        paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        # A column of a nested type, such as a list of messages, is stored as several.
        indices = [i for i, path in enumerate(paths) if any(f"{path}.".startswith(f"{column}.") for column in columns)]
        row = 0
        for group in range(table.num_row_groups):
            meta = metadata.row_group(group)
            if row + meta.num_rows <= start:
                row += meta.num_rows
                continue
            num_rows = self._rows_at_a_time(meta, [meta.column(index) for index in indices], row, max_bytes)
            for batch in table.iter_batches(num_rows, row_groups=[group], columns=list(columns)):
                for values in zip(*(_values(batch.column(column)) for column in columns), strict=True):
                    row += 1
                    if row > start:
                        yield row, values, self._num_bytes * row // max(1, metadata.num_rows)

    def _rows_at_a_time(self, meta: Any, chunks: list[Any], row: int, max_bytes: int) -> int:
        """How many rows of the row group ``meta``, which begins after ``row``, are read at a time."""
        each = sum(chunk.total_uncompressed_size for chunk in chunks) // max(1, meta.num_rows)
        dictionary = sum(
            _dictionary_bytes(self._headers, self._num_bytes, chunk) * -(-chunk.num_values // max(1, meta.num_rows))
            for chunk in chunks
            if chunk.has_dictionary_page
        )
        if max(each, dictionary) > (limit := max(max_bytes, READ_BYTES)):
            declared = f"a dictionary of {dictionary:,}" if dictionary > limit else f"texts of {each:,}"
            raise TooLargeError(f"after row {row:,} the file declares {declared} bytes, more than {limit:,}")
        return max(1, min(MAX_ROWS, READ_BYTES // max(1, each, dictionary)))


def _dictionary_bytes(file: IO[bytes], num_bytes: int, chunk: Any) -> int:
    """Uncompressed size of the dictionary: the second number in the header of its page (thrift's compact protocol)."""
    declared, offset = int(chunk.total_uncompressed_size), chunk.dictionary_page_offset
    if offset is None or not 0 <= offset < num_bytes:
        return declared
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
        values = [text_or_bytes(item) for item in array]
    return [decoded(value) for value in values]
