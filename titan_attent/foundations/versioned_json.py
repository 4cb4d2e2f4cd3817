"""JSON files that say what they are: ``format`` and ``version``, then their fields.

Cost: a file is read whole; one of more than ``MAX_BYTES`` is refused unread.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_BYTES = 2**28
"""An index of a million shards has some 200 MB."""

FORMATS = {
    "titan_attent.tokens": "a data set of text, which text models learn (llama3_attent, ...)",
    "titan_attent.images": "a data set of images, which vit_attent and mae_attent learn",
    "titan_attent.reference": "a scorer's losses, for teacher.scores",
}
"""What a folder is, to whoever named it where another kind belongs."""


def encode_versioned(fields: dict[str, Any], *, format: str, version: int) -> bytes:
    """The file's bytes, ASCII."""
    return (json.dumps({"format": format, "version": version, **fields}, indent=1) + "\n").encode("ascii")


def read_json_object(path: Path, *, max_bytes: int | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it is no JSON object, is nested too deeply, or has more than ``max_bytes`` (``MAX_BYTES``).
        OSError: it cannot be read.
    """
    limit = MAX_BYTES if max_bytes is None else max_bytes
    if (num_bytes := path.stat().st_size) > limit:
        raise ValueError(f"has {num_bytes:,} bytes, more than the {limit:,} that are read")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if value == []:  # an object without fields, as some languages write it
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__} where an object is expected")
    return value


def read_versioned(path: Path, *, format: str, versions: Sequence[int], mend: str) -> dict[str, Any]:
    """The fields of a file, without format and version; ValueError if it cannot be read or is of another kind.

    Give the fields to :func:`~titan_attent.foundations.typed.typed`: any of them may be of any type.

    Args:
        versions: those that are read.
        mend: what to do about a bad file, for the message: "restore the file".
    """
    try:
        fields = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a file with a JSON object in it ({error}); {mend}") from error
    found = fields.pop("format", None), fields.pop("version", None)
    if found[0] != format or type(found[1]) is not int or found[1] not in versions:
        name, version = (repr(value)[:80] for value in found)
        what = f"{path}: format {name} version {version}, but what is read here is {format!r} version "
        what += " or ".join(map(str, versions))
        if isinstance(found[0], str) and found[0] != format and {found[0], format} <= FORMATS.keys():
            raise ValueError(
                f"{what}. The folder holds {FORMATS[found[0]]}; what is wanted is {FORMATS[format]}. Name another "
                "folder, or another model"
            )
        how = "wrote it" if found[0] == format else f"reads {name}, give a folder of the format that is read here"
        raise ValueError(f"{what}; use the package version that {how}, or {mend}")
    return fields
