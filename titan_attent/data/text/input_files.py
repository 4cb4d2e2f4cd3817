"""What a file of the writer's inputs is, by its name: records or a text. A .json file is looked into.

Cost: one stat a file, and a look at the head of each .json file.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from titan_attent.data.text.json_values import sniff

TEXT_EXTENSIONS = (
    *("txt", "md", "rst", "tex", "html", "css", "json", "yaml", "yml", "toml"),
    *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "cuh", "rs", "go", "java", "js", "ts", "sh"),
)
LINE_EXTENSIONS = ("jsonl", "ndjson", "jsonlines", "jl")
RECORD_EXTENSIONS = (*LINE_EXTENSIONS, "json", "parquet")
"""All of these but parquet, and those of text, may be compressed: ``.json.gz``."""
PACKED_EXTENSIONS = ("zst", "bz2", "xz", "lz4", "zip", "tar", "tgz", "7z", "gz")


class InputFile(NamedTuple):
    """A file of ``source`` to read. ``optional``: it was found in a folder, and is left out if it is not text."""

    source: str
    path: Path
    extension: str
    num_bytes: int
    modified_ns: int
    optional: bool
    kind: str = "text"
    """"lines": a JSON record a line; "values": an array of them, or records over several lines; "parquet"; "text"."""

    @property
    def compressed(self) -> bool:
        return self.extension.endswith("gz")


def list_named_file(path: Path, *, source: str, extensions: Sequence[str], text_key: str) -> InputFile:
    """A file that was named itself; what its name says of records is believed.

    Raises:
        ValueError: it is missing, or of unknown extension.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; correct the path of this input")
    extension = extension_of(path)
    bare = extension.removesuffix(".gz")
    if extension in extensions or bare in (*extensions, *RECORD_EXTENSIONS) and extension != "parquet.gz":
        kind = kind_of(path, extension=extension, text_key=text_key)
        if bare == "json" and kind == "text":
            kind = "values"  # who reads it says what they are
        return input_file(path, source=source, optional=False, kind=kind)
    if extension.rpartition(".")[2] in PACKED_EXTENSIONS:
        raise ValueError(
            f"{path}: unsupported extension {extension!r}; unpack it first, into .jsonl, .parquet or text files ("
            ".jsonl.gz, .json.gz and .txt.gz are read)"
        )
    if not extension:
        raise ValueError(
            f"{path}: unsupported extension: it has no extension, which tells how a file is read. Give its name one: "
            ".txt of a text, .jsonl of JSON lines, .parquet, or another that --extensions names; or convert it to jsonl"
        )
    raise ValueError(
        f"{path}: unsupported extension {extension!r}; convert it to jsonl, parquet or txt, or, if "
        f"it is text, read it as one document with --extensions {extension}"
    )


def kind_of(path: Path, *, extension: str, text_key: str) -> str:
    """How a file is read; "text" also for a .json file that holds no records with the key."""
    bare = extension.removesuffix(".gz")
    if bare == "json":
        found = sniff(path, text_key=text_key)
        # Several objects a line each are records, whatever their keys.
        if found is None or not (found.has_key or found.several):
            return "text"
        return "lines" if found.lines else "values"
    return "parquet" if extension == "parquet" else "lines" if bare in LINE_EXTENSIONS else "text"


def extension_of(path: Path) -> str:
    """``txt``, ``json.gz``, or "" where there is none; in lower case."""
    stem, dot, extension = path.name.lower().rpartition(".")
    if extension == "gz" and "." in stem:
        extension = f"{stem.rpartition('.')[2]}.gz"
    return extension if dot else ""


def input_file(path: Path, *, source: str, optional: bool, kind: str) -> InputFile:
    stat = path.stat()
    # Absolute, so that a run may be resumed from another folder.
    absolute = Path(os.path.abspath(path))
    return InputFile(source, absolute, extension_of(path), stat.st_size, stat.st_mtime_ns, optional, kind)
