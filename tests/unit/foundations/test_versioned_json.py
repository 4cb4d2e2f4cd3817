"""versioned_json.py: a folder of another kind is called by its name; another version leads to the package."""

from itertools import permutations
from pathlib import Path

import pytest

from titan_attent.foundations.versioned_json import FORMATS, encode_versioned, read_versioned


@pytest.mark.parametrize("found, wanted", list(permutations(FORMATS, 2)))
def test_a_folder_of_another_kind_is_called_by_what_it_holds(tmp_path: Path, found: str, wanted: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(encode_versioned({}, format=found, version=1))
    with pytest.raises(ValueError) as caught:
        read_versioned(path, format=wanted, versions=(1,), mend="restore it")
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: format {found!r} version 1, but what is read here is {wanted!r}")
        and "package version" not in message
    )
    assert message.index(FORMATS[found]) < message.index(FORMATS[wanted]) < message.index("another model")


def test_another_version_or_a_stranger_leads_to_the_package(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    for format, version in (("titan_attent.tokens", 3), ("titan_attent.tokens", None), ("other", 1)):
        path.write_bytes(encode_versioned({}, format=format, version=version))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="package version that .*or restore it"):
            read_versioned(path, format="titan_attent.tokens", versions=(1, 2), mend="restore it")
    path.write_text('{"format": ["titan_attent.images"], "version": {}}')
    with pytest.raises(ValueError, match="package version"):
        read_versioned(path, format="titan_attent.tokens", versions=(1, 2), mend="restore it")
