"""Reads columns of any type in an Arrow file: the file format (also Feather, version 2) and the stream format.

``datasets`` writes streams: the cache of ``load_dataset`` and the folders of ``save_to_disk``, whose ``state.json``
names their files in order (saved_folder.py).

A local file is mapped, and its values become Python objects one row at a time. Before that, offsets are checked, as
Arrow itself trusts them.

Cost: memory of one document and, of compressed or remote files, of the read columns of one record batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from titan_attent.data.io.remote import InputPath
from titan_attent.data.text.column_values import decoded, text_or_bytes

FILE_MAGIC, FEATHER_1_MAGIC = b"ARROW1", b"FEA1"
CHECKED_ROWS = 1024
"""Rows whose offsets are checked at a time."""


class ArrowRows:
    """An open Arrow file.

    Attributes:
        names: of its columns.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged.
    """

    noun = "an Arrow file"

    def __init__(self, path: InputPath, *, num_bytes: int):
        import pyarrow

        self._path, self._num_bytes = path, num_bytes
        with ExitStack() as stack:
            head = stack.enter_context(path.open("rb")).read(len(FILE_MAGIC)) if num_bytes else b""
            if head.startswith(FEATHER_1_MAGIC):
                raise pyarrow.ArrowInvalid("Feather of version 1; write it as version 2")
            self._is_file = head == FILE_MAGIC
            with self._source() as source:
                self._schema = self._reader(source, None).schema
            self.names: list[str] = self._schema.names

    def __enter__(self) -> "ArrowRows":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _source(self) -> Any:
        import pyarrow

        if isinstance(self._path, Path):
            # A file without a byte cannot be mapped.
            return pyarrow.memory_map(str(self._path)) if self._num_bytes else pyarrow.BufferReader(b"")
        return pyarrow.PythonFile(self._path.open("rb", parts=self._is_file), mode="r")

    def _reader(self, source: Any, columns: Sequence[str] | None) -> Any:
        import pyarrow

        included = None if columns is None else sorted({self._schema.get_field_index(column) for column in columns})
        options = pyarrow.ipc.IpcReadOptions(included_fields=included, use_threads=False)
        return (pyarrow.ipc.open_file if self._is_file else pyarrow.ipc.open_stream)(source, options=options)

    def rows(self, columns: Sequence[str], *, start: int, max_bytes: int) -> Iterator[tuple[int, tuple[Any, ...], int]]:
        """Yield the number (from 1) and the values of every row after the first ``start``, and the bytes up to it.

        A value is as in parquet_text.py.

        Args:
            max_bytes: not used: a row is as large as the file says.
        """
        row = 0
        with self._source() as source:
            for batch, first, last in self._batches(source, self._reader(source, columns)):
                if row + batch.num_rows <= start:
                    row += batch.num_rows
                    continue
                arrays = [batch.column(column) for column in columns]
                for at in range(batch.num_rows):
                    if at % CHECKED_ROWS == 0:
                        for array in arrays:
                            check_offsets(array.slice(at, CHECKED_ROWS))
                    row += 1
                    if row > start:
                        values = tuple(decoded(text_or_bytes(array[at])) for array in arrays)
                        yield row, values, first + (last - first) * (at + 1) // batch.num_rows

    def _batches(self, source: Any, reader: Any) -> Iterator[tuple[Any, int, int]]:
        """Every record batch, and the bytes of the file before and after it."""
        if self._is_file:
            num = reader.num_record_batches
            for number in range(num):
                yield reader.get_batch(number), self._num_bytes * number // num, self._num_bytes * (number + 1) // num
            return
        done = 0
        for batch in reader:
            before, done = done, source.tell()
            yield batch, before, done


def check_offsets(array: Any) -> None:
    """pyarrow.ArrowInvalid if the offsets or indices of ``array`` lead outside of it. Texts need not be UTF-8."""
    import pyarrow

    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    (array.view(binary[array.type]) if array.type in binary else array).validate(full=True)
