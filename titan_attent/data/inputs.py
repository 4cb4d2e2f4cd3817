"""Inputs of the writer: the names of sources (web, code, ...) and the files to read, listed once, folders by path."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from titan_attent.data.format import DEFAULT_SOURCE, is_source_name

TEXT_EXTENSIONS = (
    *("txt", "md", "rst", "tex", "html", "css", "json", "yaml", "yml", "toml"),
    *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "cuh", "rs", "go", "java", "js", "ts", "sh"),
)
RECORD_EXTENSIONS = ("jsonl", "jsonl.gz", "parquet")


class InputFile(NamedTuple):
    """A file of ``source`` to read. ``optional``: it was found in a folder, and is left out if it is not text."""

    source: str
    path: Path
    extension: str
    num_bytes: int
    modified_ns: int
    optional: bool


def parse_inputs(inputs: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Source and path of every input, in order.

    A string may be ``NAME=PATH``, and its path a pattern with ``*``, ``?``, ``[...]`` or ``**``, which a shell leaves
    alone behind ``NAME=``. What exists as it is given, has a ``/`` before its ``=``, or is a ``Path``, is a path.

    Raises:
        ValueError: what stands before the ``=`` is no valid name, or no path stands behind it.
    """
    parsed: list[tuple[str, Path]] = []
    for given in inputs:
        source, path = DEFAULT_SOURCE, str(given)
        if isinstance(given, Path) or os.path.exists(path):
            parsed.append((source, Path(path)))
            continue
        before, equals, behind = path.partition("=")
        if equals and "/" not in before:
            source, path = before, behind
            if not is_source_name(source):
                raise ValueError(
                    f"{given}: {source!r} is no name of a source; make it of letters, digits, '_', '.' and '-', or "
                    f"write ./{given} if all of it is a path"
                )
            if not path:
                raise ValueError(f"{given}: no path; give NAME=PATH")
        # A pattern that matches nothing stays, and is refused as a missing file.
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or [path]
        parsed += [(source, Path(match)) for match in found]
    return parsed


def list_files(inputs: Sequence[tuple[str, Path]], *, extensions: Sequence[str]) -> list[InputFile]:
    """The files of ``inputs``. Of a folder: its files with one of ``extensions`` (``txt``), outside hidden folders.

    Args:
        inputs: source and path of each, of :func:`parse_inputs`.

    Raises:
        ValueError: an input is missing or of unknown extension, or a folder has no such file.
    """
    files: list[InputFile] = []
    known = {*extensions, *RECORD_EXTENSIONS}
    for source, path in inputs:
        if path.is_dir():
            found = _list_folder(path, extensions=set(extensions))
            if not found:
                raise ValueError(
                    f"{path}: this folder has no file with extension {', '.join(extensions)}; name those "
                    "to read with --extensions"
                )
            files += [_input_file(file, source=source, optional=True) for file in found]
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder; correct the path of this input")
        elif (extension := _extension(path)) in known:
            files.append(_input_file(path, source=source, optional=False))
        else:
            raise ValueError(
                f"{path}: unsupported extension {extension!r}; convert it to jsonl, parquet or txt, or, if "
                f"it is text, read it as one document with --extensions {extension}"
            )
    return files


def _list_folder(folder: Path, *, extensions: set[str]) -> list[Path]:
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in names]
    # Sorted as strings, whatever order the file system lists; is_file() leaves out pipes and dead links.
    paths.sort(key=lambda path: path.as_posix())
    return [path for path in paths if _extension(path) in extensions and path.is_file()]


def _extension(path: Path) -> str:
    name = path.name.lower()
    return "jsonl.gz" if name.endswith(".jsonl.gz") else name.rpartition(".")[2] if "." in name else ""


def _input_file(path: Path, *, source: str, optional: bool) -> InputFile:
    stat = path.stat()
    # Absolute, so that a run may be resumed from another folder.
    return InputFile(source, Path(os.path.abspath(path)), _extension(path), stat.st_size, stat.st_mtime_ns, optional)
