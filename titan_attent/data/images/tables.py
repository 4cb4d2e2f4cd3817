"""Images of a .parquet file in Hugging Face's layout.

Cost: 64 rows of two columns in memory, or what the parquet file decodes at once of a row group.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_attent.data.images.examples import IMAGE_KEYS, LABEL_KEYS, Bad, Example, Label, Limits, choose
from titan_attent.data.walk import LeftOut

ROWS_PER_READ = 64


class TableInput:
    """A .parquet file: an image column, struct<bytes, path> or binary, and a label column of integers or strings.

    The names of the classes are those of the ``huggingface`` metadata of its schema, if it has any.

    Raises:
        ValueError: it is damaged, or has no such columns.
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
        image, label = schema.field(self.image_key).type, schema.field(self.label_key).type
        if pyarrow.types.is_struct(image):
            has_bytes = image.get_field_index("bytes") >= 0
        else:
            has_bytes = pyarrow.types.is_binary(image) or pyarrow.types.is_large_binary(image)
        if not has_bytes:
            raise ValueError(
                f"{path}: column {self.image_key!r} is {image}; images are struct<bytes, path> or binary; choose the "
                "column with --keys IMAGE,LABEL"
            )
        if not (pyarrow.types.is_integer(label) or pyarrow.types.is_string(label)):
            raise ValueError(
                f"{path}: column {self.label_key!r} is {label}; labels are integers or strings; choose the column with "
                "--keys IMAGE,LABEL"
            )
        self.names = _class_names(schema.metadata, self.label_key)

    def labels(self) -> Iterator[Label]:
        try:
            for (label,) in self._rows([self.label_key]):
                if isinstance(label, str) and label or isinstance(label, int) and label >= 0:
                    yield label
        except self._damage:
            return  # which examples() reports

    def examples(self) -> Iterator[Example | Bad]:
        row = 0
        try:
            for row, (image, label) in enumerate(self._rows([self.image_key, self.label_key]), start=1):
                where = f"{self.path}: row {row}"
                data = image.get("bytes") if isinstance(image, dict) else image
                if self.names is not None and isinstance(label, int):
                    number, label = label, self.names[label] if 0 <= label < len(self.names) else None
                    if label is None:
                        problem = f"label {number} is outside [0, {len(self.names)}), the classes of the file"
                        yield Bad(where, "label", problem, "correct or remove the row")
                        continue
                if label is None or label == "":
                    yield Bad(where, "label", "no label", "label or remove the row")
                elif data is None:
                    problem = f"no bytes in {self.image_key!r}: the image is null or only a path"
                    yield Bad(where, "undecodable", problem, "embed the images in the file")
                else:
                    yield Example(where, data, label)
        except self._damage as error:
            yield Bad(f"{self.path}: after row {row}", "damaged", f"the file is damaged ({error})", "download it again")

    def _rows(self, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as table:
            for batch in table.iter_batches(ROWS_PER_READ, columns=columns):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _class_names(metadata: dict[bytes, bytes] | None, label_key: str) -> Sequence[str] | None:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label_key]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None
