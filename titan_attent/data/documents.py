"""Documents out of files: one JSON line, one parquet row or one text file each, in a fixed order.

Inputs, of named sources (web, code, ...) or of the default one, are listed once (folders sorted by path), then read as
a stream. Every document comes with the
cursor behind it, from which reading goes on later without reading again what came before.

Cost: one document in memory, for parquet 1024 rows of one column.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_attent.data.format import DEFAULT_SOURCE, is_source_name

TEXT_EXTENSIONS = (
    *("txt", "md", "rst", "tex", "html", "css", "json", "yaml", "yml", "toml"),
    *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "cuh", "rs", "go", "java", "js", "ts", "sh"),
)
RECORD_EXTENSIONS = ("jsonl", "jsonl.gz", "parquet")
ROWS_PER_READ = 1024


class InputFile(NamedTuple):
    """A file of ``source`` to read; ``optional`` for one found in a folder, which is left out if it is not text."""

    source: str
    path: Path
    extension: str
    num_bytes: int
    modified_ns: int
    optional: bool


class Cursor(NamedTuple):
    """Where to read on: in file number ``file``, after ``row`` lines or rows and ``offset`` bytes."""

    file: int = 0
    row: int = 0
    offset: int = 0


START = Cursor()


class Document(NamedTuple):
    """``text`` is None for an optional file that is not text; ``num_bytes`` are those of the file."""

    source: str
    text: str | None
    cursor: Cursor
    num_bytes: int


def parse_inputs(inputs: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Source and path of every input, in order.

    A string may be ``NAME=PATH``, and its path a pattern with ``*``, ``?``, ``[...]`` or ``**``, which a shell leaves
    alone behind ``NAME=``. What exists as it is given, has a ``/`` before its ``=``, or is a ``Path``, is a path.

    Raises:
        ValueError: a name that is none, or no path behind it.
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
    """The files of ``inputs``; of a folder those with one of ``extensions`` (``txt``), outside hidden folders.

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


def read_documents(files: Sequence[InputFile], *, text_key: str, start: Cursor = START) -> Iterator[Document]:
    """The documents of ``files`` in order, from ``start`` on.

    Args:
        text_key: the key of a JSON line, or the column of a parquet file, that holds the text.

    Raises:
        ValueError: a record or file that cannot be read; names the file and the line or row.
    """
    for number in range(start.file, len(files)):
        at = start if number == start.file else Cursor(number)
        file = files[number]
        if file.extension in ("jsonl", "jsonl.gz"):
            yield from _read_jsonl(file, text_key=text_key, start=at)
        elif file.extension == "parquet":
            yield from _read_parquet(file, text_key=text_key, start=at)
        else:
            yield Document(file.source, _read_text(file), Cursor(number + 1), file.num_bytes)


def _read_text(file: InputFile) -> str | None:
    content = file.path.read_bytes()
    if file.optional and b"\0" in content:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if file.optional:
            return None
        raise ValueError(f"{file.path}: not UTF-8 ({error}); convert the file to UTF-8") from error


def _read_jsonl(file: InputFile, *, text_key: str, start: Cursor) -> Iterator[Document]:
    number, row, offset = start
    with open(file.path, "rb") as raw:
        lines: io.BufferedIOBase = gzip.open(raw) if file.extension == "jsonl.gz" else raw  # noqa: SIM115
        place = 0
        try:
            lines.seek(offset)
            for line in lines:
                row, offset = row + 1, offset + len(line)
                if line.strip():
                    text = _text_of_line(line, text_key=text_key, where=f"{file.path}:{row}")
                    # Of the file itself, compressed or not.
                    place, before = raw.tell(), place
                    yield Document(file.source, text, Cursor(number, row, offset), place - before)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{file.path}: damaged gzip file after line {row} ({error}); download or compress it again"
            ) from error


def _text_of_line(line: bytes, *, text_key: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: malformed JSON line ({error}); fix or remove the line") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__} where an object with the key {text_key!r} is "
            "expected; write one object a line"
        )
    if text_key not in record:
        raise ValueError(f"{where}: no key {text_key!r}; {_choose(record)}")
    return _check_text(record[text_key], text_key=text_key, where=where)


def _choose(names: Any) -> str:
    return f"name the one that holds the text with --text-key, of {', '.join(map(repr, names))}"


def _check_text(text: Any, *, text_key: str, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {text_key!r} is {type(text).__name__}, not a string; fix or remove the record, or "
            "choose another --text-key"
        )
    return text


def _read_parquet(file: InputFile, *, text_key: str, start: Cursor) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number, row, place = start.file, 0, 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            num_rows, names = table.metadata.num_rows, table.schema_arrow.names
            if text_key not in names:
                raise ValueError(f"{file.path}: no column {text_key!r}; {_choose(names)}")
            for group in range(table.num_row_groups):
                group_rows = table.metadata.row_group(group).num_rows
                if row + group_rows <= start.row:
                    row += group_rows
                    continue
                batches = table.iter_batches(ROWS_PER_READ, row_groups=[group], columns=[text_key])
                for batch in batches:
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row <= start.row:
                            continue
                        where = f"{file.path}: row {row}"
                        text = _check_text(value, text_key=text_key, where=where)
                        done = file.num_bytes * row // num_rows
                        yield Document(file.source, text, Cursor(number, row), done - place)
                        place = done
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.path}: damaged or not a parquet file ({error}); download or write it again") from error
