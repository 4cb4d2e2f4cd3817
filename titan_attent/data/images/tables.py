"""Images of a .parquet file in Hugging Face's layout.

Each read takes only as many rows as can have at most 64 MiB of images, according to the metadata of the row group. The
worst case counts: each row may repeat one large value of a dictionary, and compressed data may expand into few rows.

Cost: 13 us of one core per row. In memory are up to 16 rows, or 4,096 labels, the page of the file that holds them, and
a read-ahead buffer of 1 MiB.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_attent.data.images.examples import IMAGE_KEYS, LABEL_KEYS, Bad, Example, Label, Limits, choose_key
from titan_attent.data.io.walk import LeftOut

MAX_ROWS = 16
MAX_LABELS = 2**12
_READ_BYTES = 2**26
_BUFFER_BYTES = 2**20
_MAX_EXPANSION = 100
"""Uncompressed / compressed bytes above which the limit of bytes applies to a row group; images hardly compress."""
_BYTES = ("binary", "large_binary", "binary_view")
_TEXTS = ("string", "large_string", "string_view")


class TableInput:
    """A .parquet file: an image column, struct<bytes, path> or binary, and a label column of integers or strings.

    All of Arrow's types of bytes and strings are read, and dictionaries of them. The names of the classes come from the
    ``huggingface`` metadata of the schema, if present.

    Raises:
        ValueError: it is damaged, or a column is missing, of another type, or present twice.
    """

    holds_files = True
    ordered = True
    left_out, num_unread, num_images = LeftOut(), 0, None

    def __init__(self, path: Path, *, keys: tuple[str, str] | None, limits: Limits):
        import pyarrow
        import pyarrow.parquet

        self.path, self.limits = path, limits
        self._damage = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
        try:
            schema = pyarrow.parquet.read_schema(path)
        except self._damage as error:
            raise ValueError(f"{path}: damaged or not a parquet file ({error}); download or write it again") from error
        image_key, label_key = keys or (None, None)
        names, where = schema.names, str(path)
        self.image_key = choose_key(names, requested=image_key, defaults=IMAGE_KEYS, role="images", where=where)
        self.label_key = choose_key(names, requested=label_key, defaults=LABEL_KEYS, role="labels", where=where)
        image, label = (_storage_type(schema.field(key).type) for key in (self.image_key, self.label_key))
        self._nested = pyarrow.types.is_struct(image)
        if self._nested:
            index = image.get_field_index("bytes")  # -1 if there are none or two
            has_bytes = index >= 0 and _is_bytes(_storage_type(image.field(index).type))
        else:
            has_bytes = _is_bytes(image)
        if not has_bytes:
            raise ValueError(
                f"{path}: column {self.image_key!r} is {image}; images must be struct<bytes, path> or binary; choose "
                "the column with --keys IMAGE,LABEL"
            )
        if not (pyarrow.types.is_integer(label) or str(label) in _TEXTS):
            raise ValueError(
                f"{path}: column {self.label_key!r} is {label}; labels must be integers or strings; choose the column "
                "with --keys IMAGE,LABEL"
            )
        self.names = _class_names(schema.metadata, self.label_key)

    def labels(self) -> Iterator[Label]:
        try:
            for row in self._rows([self.label_key]):
                label = None if isinstance(row, Bad) else _value(row[1])
                if isinstance(label, str) and label or isinstance(label, int) and label >= 0:
                    yield label
        except self._damage:
            return  # examples() reports it

    def examples(self) -> Iterator[Example | Bad]:
        number = 0
        try:
            for row in self._rows([f"{self.image_key}.bytes" if self._nested else self.image_key, self.label_key]):
                if isinstance(row, Bad):
                    yield row
                else:
                    number = row[0]
                    yield self._example(*row)
        except self._damage as error:
            yield Bad(
                f"{self.path}: after row {number}", "damaged", f"the file is damaged ({error})", "download it again"
            )

    def _example(self, row: int, image: Any, label: Any) -> Example | Bad:
        where, label = f"{self.path}: row {row}", _value(label)
        if isinstance(label, Bad):
            return label._replace(where=where)
        if self.names is not None and isinstance(label, int):
            number, label = label, self.names[label] if 0 <= label < len(self.names) else None
            if label is None:
                problem = f"label {number} is outside [0, {len(self.names)}), the classes of the file"
                return Bad(where, "label", problem, "correct or remove the row")
        if label is None or label == "":
            return Bad(where, "label", "no label", "label or remove the row")
        data = (image["bytes"] if self._nested and image.is_valid else image).as_py()
        if data is None:
            problem = f"no bytes in {self.image_key!r}: the image is null or only a path"
            return Bad(where, "undecodable", problem, "embed the images in the file")
        if len(data) > self.limits.file_bytes:
            problem = f"has {len(data):,} bytes, more than {self.limits.file_bytes:,}, the limit"
            return Bad(where, "large", problem, "remove it, or raise --max-file-bytes")
        return Example(where, data, label)

    def _rows(self, columns: list[str]) -> Iterator[tuple[Any, ...] | Bad]:
        """The number of each row, from 1, and its scalars with the label last; Bad for a row group that is not read."""
        import pyarrow.parquet

        # Without a buffer size, each row group is read into memory as a whole.
        with pyarrow.parquet.ParquetFile(self.path, buffer_size=_BUFFER_BYTES) as table:
            first = 1
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                rows = self._rows_per_read(table.metadata.row_group(group), columns)
                if isinstance(rows, Bad):
                    yield rows._replace(where=f"{self.path}: rows {first} to {first + num_rows - 1}")
                else:
                    row = first
                    for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
                        # Scalars one by one, so that a value of a dictionary is not copied for each of its rows.
                        arrays = [batch.column(self.image_key)] if len(columns) > 1 else []
                        arrays.append(batch.column(self.label_key))
                        for i in range(batch.num_rows):
                            yield row, *(array[i] for array in arrays)
                            row += 1
                first += num_rows

    def _rows_per_read(self, group: Any, columns: list[str]) -> int | Bad:
        """The number of rows of a row group with at most ``_READ_BYTES``; Bad if the group expands above the limit."""
        largest = 1
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema not in columns or not group.num_rows:
                continue
            compressed, expanded = chunk.total_compressed_size, chunk.total_uncompressed_size
            # The bytes that a single value may have above the mean: all that compression saves, and a whole dictionary.
            excess = max(0, expanded - compressed)
            if excess > self.limits.file_bytes and expanded > _MAX_EXPANSION * compressed:
                problem = f"{chunk.path_in_schema!r} has {compressed:,} bytes in the file, which expand to {expanded:,}"
                return Bad("", "large", problem, "write the file again, or raise --max-file-bytes")
            if chunk.has_dictionary_page:
                excess += max(0, chunk.data_page_offset - (chunk.dictionary_page_offset or 0))
            largest = max(largest, expanded // group.num_rows, excess)
        max_rows = MAX_ROWS if len(columns) > 1 else MAX_LABELS
        return max(1, min(max_rows, _READ_BYTES // largest))


def _storage_type(arrow_type: Any) -> Any:
    """The type of the stored values: the value type of a dictionary, the storage type of an extension type."""
    import pyarrow

    while True:
        if pyarrow.types.is_dictionary(arrow_type):
            arrow_type = arrow_type.value_type
        elif isinstance(arrow_type, pyarrow.BaseExtensionType):
            arrow_type = arrow_type.storage_type
        else:
            return arrow_type


def _is_bytes(arrow_type: Any) -> bool:
    return str(arrow_type) in _BYTES or str(arrow_type).startswith("fixed_size_binary[")


def _value(label: Any) -> Any:
    """The Python value of a scalar; Bad without ``where`` for a string that is not UTF-8."""
    try:
        return label.as_py()
    except UnicodeDecodeError as error:
        return Bad("", "label", f"its label is not UTF-8 ({error})", "correct or remove the row")


def _class_names(metadata: dict[bytes, bytes] | None, label_key: str) -> Sequence[str] | None:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label_key]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None
