"""JSON files that name their format: the keys ``format`` and ``version``, then their fields.

Cost: a file is read whole; a file larger than ``MAX_BYTES`` is refused before it is read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_BYTES = 2**28
"""The largest file that is read; an index of a million shards has about 200 MB."""

FORMATS = {
    "titan_attent.tokens": "a data set of text, for text models (llama3_attent, ...)",
    "titan_attent.images": "a data set of images, for vit_attent and mae_attent",
    "titan_attent.reference": "a scorer's losses, for teacher.scores",
    "titan_attent.bigram": "the table of a bigram scorer",
}
"""Format -> its description, for the error message about a folder of the wrong format."""


def encode_versioned(fields: dict[str, Any], *, format: str, version: int) -> bytes:
    """The bytes of such a file, ASCII."""
    return (json.dumps({"format": format, "version": version, **fields}, indent=1) + "\n").encode("ascii")


def read_json_object(path: Path, *, max_bytes: int | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is no JSON object, is nested too deeply, or is larger than ``max_bytes`` (``MAX_BYTES``).
        OSError: the file cannot be read.
    """
    limit = MAX_BYTES if max_bytes is None else max_bytes
    if (num_bytes := path.stat().st_size) > limit:
        raise ValueError(f"has {num_bytes:,} bytes, more than the {limit:,} bytes that are accepted")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if value == []:  # some languages write an object without fields this way
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__} where an object is expected")
    return value


def read_versioned(path: Path, *, format: str, versions: Sequence[int], fix: str) -> dict[str, Any]:
    """The fields of a file, without format and version; ValueError if it cannot be read or has another format.

    The types of the fields are not checked: pass them to :func:`~titan_attent.foundations.typed.typed`.

    Args:
        versions: the accepted versions.
        fix: how to fix a bad file, for the message: "restore the file".
    """
    try:
        fields = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a file with a JSON object in it ({error}); {fix}") from error
    stored_format, stored_version = fields.pop("format", None), fields.pop("version", None)
    if stored_format != format or type(stored_version) is not int or stored_version not in versions:
        name, version = (repr(value)[:80] for value in (stored_format, stored_version))
        problem = f"{path}: format {name} version {version}, but expected format {format!r} version "
        problem += " or ".join(map(str, versions))
        if isinstance(stored_format, str) and stored_format != format and {stored_format, format} <= FORMATS.keys():
            raise ValueError(
                f"{problem}. The folder holds {FORMATS[stored_format]}; expected is {FORMATS[format]}. Name another "
                "folder, or another model"
            )
        which = "wrote it" if stored_format == format else f"reads {name}, give a folder of the expected format"
        raise ValueError(f"{problem}; use the package version that {which}, or {fix}")
    return fields
