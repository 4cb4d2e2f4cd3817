"""The index.json of a folder of MosaicML MDS or of litdata: which of the two it is, and its values, checked one by one.

Cost: the file is parsed once for each format that is asked, and its size is bounded (foundations/versioned_json.py).
"""

from pathlib import Path
from typing import Any

from titan_attent.data.formats.token_file import bad
from titan_attent.data.io.folder import INDEX_FILE, check_file_name
from titan_attent.foundations.versioned_json import read_json_object

_HEAD_BYTES = 2**16


def has_key(path: Path, key: str) -> bool:
    """Whether ``path`` is an index.json whose object has ``key``, and is none of this package's own."""
    if path.name != INDEX_FILE:
        return False
    try:
        fields = read_json_object(path)
    except (OSError, ValueError):
        with open(path, "rb") as file:  # damaged: its format reports it
            return f'"{key}"'.encode() in file.read(_HEAD_BYTES)
    return key in fields and not str(fields.get("format")).startswith("titan_attent.")


def read(path: Path) -> dict[str, Any]:
    """The object of the file. ValueError if it is none."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise bad(path, f"not a file with a JSON object in it ({str(error)[:200]}): damaged") from None


class Fields:
    """An object of the file; each value is checked where it is taken."""

    def __init__(self, path: Path, value: object, *, where: str):
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise self.bad("is no object")
        self._value = value

    def bad(self, problem: str) -> ValueError:
        return bad(self.path, f"{self.where} {problem}: damaged, or of a version that is not known")

    def get(self, key: str) -> Any:
        return self._value.get(key)

    def list(self, key: str) -> list[Any]:
        value = self._value.get(key)
        if not isinstance(value, list):
            raise self.bad(f"has no list {key!r}")
        return value

    def count(self, key: str) -> int:
        """A whole number from 0 on."""
        value = self._value.get(key)
        if type(value) is not int or not 0 <= value < 2**63:
            raise self.bad(f"has no count {key!r}")
        return value

    def object(self, key: str) -> "Fields":
        return Fields(self.path, self._value.get(key), where=f"{self.where}, {key}")

    def file(self, key: str) -> Path:
        """The file of this name beside the index."""
        try:
            check_file_name(self._value.get(key), of=key)
        except ValueError as error:
            raise self.bad(f"names no file of its folder ({error})") from None
        return self.path.with_name(self._value[key])
