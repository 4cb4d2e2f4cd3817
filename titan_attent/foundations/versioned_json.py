"""JSON files that say what they are: ``format`` and ``version``, then their fields."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def encode_versioned(fields: dict[str, Any], *, format: str, version: int) -> bytes:
    """The file's bytes, ASCII."""
    return (json.dumps({"format": format, "version": version, **fields}, indent=1) + "\n").encode("ascii")


def read_versioned(path: Path, *, format: str, versions: Sequence[int], mend: str) -> dict[str, Any]:
    """The fields of a file, without format and version; ValueError if it cannot be read or is of another kind.

    Args:
        versions: those that are read.
        mend: what to do about a bad file, for the message: "restore the file".
    """
    try:
        fields = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file with a JSON object in it ({error}); {mend}") from error
    found = fields.pop("format", None), fields.pop("version", None)
    if found[0] != format or found[1] not in versions:
        raise ValueError(
            f"{path}: format {found[0]!r} version {found[1]!r}, but what is read here is {format!r} version "
            f"{' or '.join(map(str, versions))}; use the package version that wrote it, or {mend}"
        )
    return fields
