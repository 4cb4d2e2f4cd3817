"""Images of a .parquet file in Hugging Face's layout.

Rows are read so many at a time as cannot have more than 64 MiB of images, going by what the file says of each of its
row groups: a value of a dictionary may come in every row, and what is packed well may be much in few rows.

Cost: up to 16 rows, or 4,096 labels, in memory beside the page of the file that they are in, and what is read ahead, a
megabyte; 13 us of one core a row.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_attent.data.images.examples import IMAGE_KEYS, LABEL_KEYS, Bad, Example, Label, Limits, choose
from titan_attent.data.io.walk import LeftOut

MOST_ROWS = 16
MOST_LABELS = 2**12
_READ_BYTES = 2**26
_AHEAD = 2**20
_MOST_PACKED = 100
"""Bytes that one byte of a row group may become without a limit; images are packed already."""
_BYTES = ("binary", "large_binary", "binary_view")
_TEXTS = ("string", "large_string", "string_view")


class TableInput:
    """A .parquet file: an image column, struct<bytes, path> or binary, and a label column of integers or strings.

    Any of Arrow's types of bytes and of strings will do, and a dictionary of one. The names of the classes are those of
    the ``huggingface`` metadata of its schema, if it has any.

    Raises:
        ValueError: it is damaged, or has no such columns, or one of them twice.
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
        wanted = keys or (None, None)
        where = str(path)
        self.image_key = choose(schema.names, wanted=wanted[0], usual=IMAGE_KEYS, what="images", where=where)
        self.label_key = choose(schema.names, wanted=wanted[1], usual=LABEL_KEYS, what="labels", where=where)
        image, label = (_stored(schema.field(key).type) for key in (self.image_key, self.label_key))
        self._nested = pyarrow.types.is_struct(image)
        if self._nested:
            at = image.get_field_index("bytes")  # -1 if there is none, or two
            has_bytes = at >= 0 and _is_bytes(_stored(image.field(at).type))
        else:
            has_bytes = _is_bytes(image)
        if not has_bytes:
            raise ValueError(
                f"{path}: column {self.image_key!r} is {image}; images are struct<bytes, path> or binary; choose the "
                "column with --keys IMAGE,LABEL"
            )
        if not (pyarrow.types.is_integer(label) or str(label) in _TEXTS):
            raise ValueError(
                f"{path}: column {self.label_key!r} is {label}; labels are integers or strings; choose the column with "
                "--keys IMAGE,LABEL"
            )
        self.names = _class_names(schema.metadata, self.label_key)

    def labels(self) -> Iterator[Label]:
        try:
            for row in self._rows([self.label_key]):
                label = None if isinstance(row, Bad) else _value(row[1])
                if isinstance(label, str) and label or isinstance(label, int) and label >= 0:
                    yield label
        except self._damage:
            return  # which examples() reports

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
            problem = f"has {len(data):,} bytes, more than the {self.limits.file_bytes:,} that may be"
            return Bad(where, "large", problem, "remove it, or raise --max-file-bytes")
        return Example(where, data, label)

    def _rows(self, columns: list[str]) -> Iterator[tuple[Any, ...] | Bad]:
        """The number of each row, from 1, and its scalars, the label last; or a row group that is not read."""
        import pyarrow.parquet

        # A buffer: without one each row group is read at once.
        with pyarrow.parquet.ParquetFile(self.path, buffer_size=_AHEAD) as table:
            first = 1
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                rows = self._rows_per_read(table.metadata.row_group(group), columns)
                if isinstance(rows, Bad):
                    yield rows._replace(where=f"{self.path}: rows {first} to {first + num_rows - 1}")
                else:
                    row = first
                    for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
                        # One by one: the same bytes of a dictionary need not be in memory for each of its rows.
                        arrays = [batch.column(self.image_key)] if len(columns) > 1 else []
                        arrays.append(batch.column(self.label_key))
                        for i in range(batch.num_rows):
                            yield row, *(array[i] for array in arrays)
                            row += 1
                first += num_rows

    def _rows_per_read(self, group: Any, columns: list[str]) -> int | Bad:
        """How many rows of a row group have no more than ``_READ_BYTES``; Bad for one of too much in too little."""
        largest = 1
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema not in columns or not group.num_rows:
                continue
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            more = max(0, unpacked - packed)
            if more > self.limits.file_bytes and unpacked > _MOST_PACKED * packed:
                problem = f"{chunk.path_in_schema!r} has {packed:,} bytes here, which become {unpacked:,}"
                return Bad("", "large", problem, "write the file again, or raise --max-file-bytes")
            # What any one value can have beyond the mean: what is won by packing, and a whole dictionary.
            if chunk.has_dictionary_page:
                more += max(0, chunk.data_page_offset - (chunk.dictionary_page_offset or 0))
            largest = max(largest, unpacked // group.num_rows, more)
        most = MOST_ROWS if len(columns) > 1 else MOST_LABELS
        return max(1, min(most, _READ_BYTES // largest))


def _stored(kind: Any) -> Any:
    """The type of the values of a dictionary, and of what an extension type is stored as."""
    import pyarrow

    while True:
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        elif isinstance(kind, pyarrow.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def _is_bytes(kind: Any) -> bool:
    return str(kind) in _BYTES or str(kind).startswith("fixed_size_binary[")


def _value(label: Any) -> Any:
    """Of a scalar; Bad without its place for a text that is none."""
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
