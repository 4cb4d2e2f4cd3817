"""versioned_json.py: the error describes a folder of another format; for another version it names the package."""

from itertools import permutations
from pathlib import Path

import pytest

from titan_attent.foundations.versioned_json import FORMATS, encode_versioned, read_versioned


@pytest.mark.parametrize("stored, expected", list(permutations(FORMATS, 2)))
def test_the_error_describes_the_folder_and_the_expected_format(tmp_path: Path, stored: str, expected: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(encode_versioned({}, format=stored, version=1))
    with pytest.raises(ValueError) as caught:
        read_versioned(path, format=expected, versions=(1,), fix="restore it")
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: format {stored!r} version 1, but expected format {expected!r}")
        and "package version" not in message
    )
    assert message.index(FORMATS[stored]) < message.index(FORMATS[expected]) < message.index("another model")


def test_another_version_or_an_unknown_format_names_the_package_version(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    for format, version in (("titan_attent.tokens", 3), ("titan_attent.tokens", None), ("other", 1)):
        path.write_bytes(encode_versioned({}, format=format, version=version))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="package version that .*or restore it"):
            read_versioned(path, format="titan_attent.tokens", versions=(1, 2), fix="restore it")
    path.write_text('{"format": ["titan_attent.images"], "version": {}}')
    with pytest.raises(ValueError, match="package version"):
        read_versioned(path, format="titan_attent.tokens", versions=(1, 2), fix="restore it")
