"""The inputs of a command: names of sources (web, code, ...), paths and patterns."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from titan_attent.data.io.folder import DEFAULT_SOURCE, is_source_name


def parse_inputs(inputs: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """The source and path of every input, in order.

    A string may be ``NAME=PATH``. PATH may be a pattern with ``*``, ``?``, ``[...]`` or ``**``, which a shell does not
    expand after ``NAME=``. An input is a plain path if it exists, has a ``/`` before its ``=``, or is a ``Path``.

    Raises:
        ValueError: the name before the ``=`` is invalid, or the path after it is empty.
    """
    parsed: list[tuple[str, Path]] = []
    for given in inputs:
        source, path = DEFAULT_SOURCE, str(given)
        if isinstance(given, Path) or os.path.exists(path):
            parsed.append((source, Path(path)))
            continue
        name, equals, value = path.partition("=")
        if equals and "/" not in name:
            source, path = name, value
            if not is_source_name(source):
                raise ValueError(
                    f"{given}: {source!r} is not a valid name of a source; use letters, digits, '_', '.' and '-', or "
                    f"write ./{given} if all of it is a path"
                )
            if not path:
                raise ValueError(f"{given}: no path; give NAME=PATH")
        # A pattern without a match stays in the list; the caller refuses it as a missing file.
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or [path]
        parsed += [(source, Path(match)) for match in matches]
    return parsed
