"""The inputs of a command: names of sources (web, code, ...), paths, URLs and patterns."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from titan_attent.data.io.folder import DEFAULT_SOURCE, is_source_name
from titan_attent.data.io.remote import InputPath, is_url, paths_of_url


def parse_inputs(inputs: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """The source and path of every input, in order.

    A string may be ``NAME=PATH``. PATH may be a pattern with ``*``, ``?``, ``[...]`` or ``**``, which a shell does not
    expand after ``NAME=``. An input is a plain path if it exists, has a ``/`` before its ``=``, or is a ``Path``.

    Raises:
        ValueError: the name before the ``=`` is invalid, the path after it is empty, or it is a URL.
    """
    parsed: list[tuple[str, Path]] = []
    for source, path in _named(inputs):
        if isinstance(path, str) and is_url(path):
            raise ValueError(f"{path}: this command reads no URLs; download it first")
        parsed += [(source, match) for match in _local(path)]
    return parsed


def parse_any_inputs(inputs: Sequence[str | Path]) -> list[tuple[str, InputPath]]:
    """As :func:`parse_inputs`; PATH may also be a URL, or a pattern, on a file system of fsspec (remote.py).

    Raises:
        ValueError: as there, or the URL cannot be used.
    """
    parsed: list[tuple[str, InputPath]] = []
    for source, path in _named(inputs):
        remote = isinstance(path, str) and is_url(path)
        parsed += [(source, match) for match in (paths_of_url(str(path)) if remote else _local(path))]
    return parsed


def _local(path: str | Path) -> list[Path]:
    if isinstance(path, Path) or os.path.exists(path):
        return [Path(path)]
    # A pattern without a match stays in the list; the caller refuses it as a missing file.
    return [Path(match) for match in sorted(glob.glob(path, recursive=True)) or [path]]


def _named(inputs: Sequence[str | Path]) -> Iterator[tuple[str, str | Path]]:
    """The source and path of every input; paths are those given if they exist, or are a ``Path``."""
    for given in inputs:
        path = str(given)
        if isinstance(given, Path) or os.path.exists(path):
            yield DEFAULT_SOURCE, Path(path)
            continue
        source, equals, value = path.partition("=")
        if not equals or "/" in source:
            yield DEFAULT_SOURCE, path
            continue
        if not is_source_name(source):
            raise ValueError(
                f"{given}: {source!r} is not a valid name of a source; use letters, digits, '_', '.' and '-', or "
                f"write ./{given} if all of it is a path"
            )
        if not value:
            raise ValueError(f"{given}: no path; give NAME=PATH")
        yield source, value
