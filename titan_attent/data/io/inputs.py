"""Inputs as a command is given them: names of sources (web, code, ...), paths and patterns."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from titan_attent.data.io.folder import DEFAULT_SOURCE, is_source_name


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
