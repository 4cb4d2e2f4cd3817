"""Decides how an input file is read, as records or as a text: by its extension, and for .json also by its head.

Cost: one stat per file, and one read of the head of each .json file.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from titan_attent.data.io.remote import InputPath
from titan_attent.data.text.compressed import COMPRESSIONS, bare_extension, compression_of
from titan_attent.data.text.csv_text import DELIMITERS
from titan_attent.data.text.json_values import detect_layout
from titan_attent.data.text.records import Records

TEXT_EXTENSIONS = (
    *("txt", "md", "rst", "tex", "html", "css", "json", "yaml", "yml", "toml"),
    *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "cuh", "rs", "go", "java", "js", "ts", "sh"),
)
LINE_EXTENSIONS = ("jsonl", "ndjson", "jsonlines", "jl")
TABLE_EXTENSIONS = tuple(DELIMITERS)
ARROW_EXTENSIONS = ("arrow", "feather")
COLUMN_EXTENSIONS = ("parquet", *ARROW_EXTENSIONS)
RECORD_EXTENSIONS = (*LINE_EXTENSIONS, "json", "parquet", *TABLE_EXTENSIONS, *ARROW_EXTENSIONS)
"""Files with any of these but ``COLUMN_EXTENSIONS``, or with a text extension, may be compressed: ``.json.gz``."""
PACKED_EXTENSIONS = ("bz2", "xz", "lz4", "zip", "tar", "tgz", "7z", *COMPRESSIONS)


class InputFile(NamedTuple):
    """A file of ``source`` to read. An ``optional`` file comes from a folder, and is skipped if it is not text."""

    source: str
    path: InputPath
    extension: str
    num_bytes: int
    modified_ns: int
    optional: bool
    kind: str = "text"
    """"lines": one JSON record per line; "values": a list of records, or multi-line records; "table": .csv and .tsv;
    "parquet"; "arrow"; "text"."""

    @property
    def compression(self) -> str:
        """ "gz", "zst", or "" for a file that is not compressed."""
        return compression_of(self.extension)

    @property
    def packing(self) -> str:
        """The name of the compression in messages."""
        return {"gz": "gzip"}.get(self.compression, self.compression)


def list_named_file(path: InputPath, *, source: str, extensions: Sequence[str], records: Records) -> InputFile:
    """A file that was given by its own path; its extension alone decides whether it holds records.

    Raises:
        ValueError: the file is missing, or has an unknown extension.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; correct the path of this input")
    extension = extension_of(path)
    bare = bare_extension(extension)
    is_packed_column_file = bare in COLUMN_EXTENSIONS and bare != extension
    if extension in extensions or bare in (*extensions, *RECORD_EXTENSIONS) and not is_packed_column_file:
        kind = kind_of(path, extension=extension, records=records)
        if bare == "json" and kind == "text":
            kind = "values"  # reading it reports what it holds instead of records
        return input_file(path, source=source, optional=False, kind=kind)
    if extension.rpartition(".")[2] in PACKED_EXTENSIONS:
        raise ValueError(
            f"{path}: unsupported extension {extension!r}; unpack it first, into .jsonl, .parquet or text files ("
            ".jsonl.gz, .json.gz, .txt.gz and the same with .zst are read)"
        )
    if not extension:
        raise ValueError(
            f"{path}: unsupported extension: it has no extension, which decides how a file is read. Give its name one: "
            ".txt for text, .jsonl for JSON lines, .parquet, or one that --extensions names; or convert it to jsonl"
        )
    raise ValueError(
        f"{path}: unsupported extension {extension!r}; convert it to jsonl, parquet or txt, or, if "
        f"it is text, read it as one document with --extensions {extension}"
    )


def kind_of(path: InputPath, *, extension: str, records: Records) -> str:
    """How a file is read, as ``InputFile.kind``; "text" also for a .json file without records that have the key."""
    bare = bare_extension(extension)
    if bare == "json":
        layout = detect_layout(path, text_key=records.names[0], list_key=records.list_key)
        # Several objects, one per line, are records even without the key.
        if layout is None or not (layout.has_key or layout.several):
            return "text"
        return "lines" if layout.one_per_line else "values"
    if bare in TABLE_EXTENSIONS:
        return "table"
    if extension in COLUMN_EXTENSIONS:
        return "parquet" if extension == "parquet" else "arrow"
    return "lines" if bare in LINE_EXTENSIONS else "text"


def extension_of(path: InputPath) -> str:
    """The extension in lower case, such as ``txt`` or ``json.gz``; "" if there is none."""
    stem, dot, extension = path.name.lower().rpartition(".")
    if extension in COMPRESSIONS and "." in stem:
        extension = f"{stem.rpartition('.')[2]}.{extension}"
    return extension if dot else ""


def input_file(path: InputPath, *, source: str, optional: bool, kind: str) -> InputFile:
    stat = path.stat()
    # Absolute, so that a run can be resumed from another working directory.
    absolute = Path(os.path.abspath(path)) if isinstance(path, Path) else path
    return InputFile(source, absolute, extension_of(path), stat.st_size, stat.st_mtime_ns, optional, kind)
