"""Folders that ``save_to_disk`` of Hugging Face datasets wrote: state.json names the Arrow files of the rows, in order.

A folder of several splits has dataset_dict.json, and one such folder per split. Only the files that state.json names
are read: others are of an earlier save, or results of ``map``.

Cost: one read of each of these files.
Source: ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` of datasets 5.2.
"""

import json
from collections.abc import Sequence
from typing import Any

from titan_attent.data.io.folder import check_file_name
from titan_attent.data.io.remote import InputPath
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.folders import leave_out, walk
from titan_attent.data.text.input_files import InputFile, input_file

STATE_FILE, SPLITS_FILE, INFO_FILE = "state.json", "dataset_dict.json", "dataset_info.json"
NOT_NAMED = f"not named by {STATE_FILE}"
MAX_BYTES = 2**26
"""Of one of these files."""


def list_saved_folder(
    folder: InputPath, *, source: str, extensions: Sequence[str] | None, left_out: LeftOut
) -> list[InputFile] | None:
    """The files of the rows, in order; None if ``folder`` was not written by ``save_to_disk``.

    Args:
        extensions: the extensions to read of a folder. None is returned if ``arrow`` is not among them.

    Raises:
        ValueError: it has several splits, or a file is missing or malformed.
    """
    if extensions is not None and "arrow" not in extensions:
        return None
    splits = _read(folder / SPLITS_FILE).get("splits")
    if isinstance(splits, list) and splits and all(_has_state(folder, split) for split in splits):
        if len(splits) > 1:
            raise ValueError(
                f"{folder}: holds the splits {', '.join(splits)}; name one to read it, such as {folder / splits[0]}"
            )
        return list_saved_folder(folder / splits[0], source=source, extensions=extensions, left_out=left_out)
    state = _read(folder / STATE_FILE)
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        return None
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder / STATE_FILE}: the rows are chosen by indices, as datasets 1 saved them; load the folder with "
            "datasets.load_from_disk, and save it again"
        )
    files = []
    for entry in entries:
        name = entry.get("filename") if isinstance(entry, dict) else None
        check_file_name(name, of=f"{folder / STATE_FILE}: its data file")
        path = folder / str(name)
        if not path.is_file():
            raise ValueError(f"{path}: is missing, and {STATE_FILE} beside it names it; copy the whole folder again")
        files.append(input_file(path, source=source, optional=True, kind="arrow"))
    read = {file.path.name for file in files} | {STATE_FILE, INFO_FILE}
    others = [path for path in walk(folder, extensions=None, left_out=left_out) if path.name not in read]
    leave_out(others, NOT_NAMED, left_out)
    left_out.harmless.add(NOT_NAMED)
    return files


def _has_state(folder: InputPath, split: Any) -> bool:
    return isinstance(split, str) and "/" not in split and (folder / split / STATE_FILE).is_file()


def _read(path: InputPath) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file, or if it holds something else."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        content = file.read(MAX_BYTES)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
