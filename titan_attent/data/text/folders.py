"""Which files of a folder are read: its records, or else its texts; and how many are not, and why.

A folder with records (.parquet, .jsonl, .ndjson, .json) is read as these: what stands beside them, a README, a
licence, a script, is about them. Only where there are fewer of them than of texts, in files and in bytes, is the
folder one of texts, and the records are left out. What is left out is counted by reason, and refused where it is the
greater part.

Cost: two listings of each folder, one stat a file that is read, and a look at the head of each .json file.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from titan_attent.data.io.walk import FolderWalk, LeftOut
from titan_attent.data.text.input_files import (
    RECORD_EXTENSIONS,
    TEXT_EXTENSIONS,
    InputFile,
    extension_of,
    input_file,
    kind_of,
)

ABOUT = (
    "readme",
    "licen",
    "copying",
    "notice",
    "changelog",
    "citation",
    "contributing",
    "authors",
    "dataset_info",
    "_",
)
"""How the names of files begin that are about those beside them; a "_" only where there is no extension."""
_SPLIT = re.compile(r"(?<![a-z])(train|test|val|dev)(?:ing|id|idation)?(?![a-z])")
OTHER_EXTENSION, BESIDE_RECORDS, BESIDE_TEXTS = "of another extension", "beside records", "records beside texts"


def list_folder(
    folder: Path, *, source: str, extensions: Sequence[str] | None, text_key: str, left_out: LeftOut
) -> list[InputFile]:
    """The files of ``folder`` that are read, by path; ``left_out`` counts the others.

    Args:
        extensions: what is read (``txt``), records and texts alike; None for the rule above.
    """
    walk = FolderWalk(folder)
    walk.drop_copies(lambda path: _is_wanted(extension_of(Path(path)), extensions))
    left_out.update(walk.left_out)
    records: list[InputFile] = []
    texts: list[InputFile] = []
    others: list[Path] = []
    # Sorted as strings, whatever order the walk has.
    for path in sorted(map(Path, walk.files()), key=lambda path: path.as_posix()):
        extension = extension_of(path)
        if not _is_wanted(extension, extensions):
            others.append(path)
            continue
        kind = kind_of(path, extension=extension, text_key=text_key)
        (texts if kind == "text" else records).append(input_file(path, source=source, optional=True, kind=kind))
    plain = [file for file in texts if not is_about(file.path)]
    if not records and plain and all(file.extension.removesuffix(".gz") == "json" for file in plain):
        # Nothing but .json: records of another key, which who reads them names, rather than texts full of braces.
        records = [file._replace(kind="values") for file in plain]
        texts = [file for file in texts if is_about(file.path)]
        plain = []
    if extensions is not None:
        _leave_out(others, OTHER_EXTENSION, left_out)
        return sorted(records + texts, key=lambda file: file.path.as_posix())
    fewer = len(records) < len(plain) and _num_bytes(records) < _num_bytes(plain)
    if not records or fewer:
        _leave_out(others, OTHER_EXTENSION, left_out)
        _leave_out([file.path for file in records], BESIDE_TEXTS, left_out)
        _note_splits((str(Path(os.path.relpath(file.path, folder)).parent) for file in texts), folder, left_out)
        return texts
    # What is about the records takes nothing from them; nor do others that are few, or small.
    beside = [file.path for file in texts] + others
    strange = [path for path in beside if not is_about(path)]
    many = len(strange) > len(records) and sum(path.stat().st_size for path in strange) > _num_bytes(records)
    _leave_out(beside, BESIDE_RECORDS, left_out)
    _note_splits((os.path.relpath(file.path, folder) for file in records), folder, left_out)
    if not many:
        left_out.harmless.add(BESIDE_RECORDS)
    return records


def _is_wanted(extension: str, extensions: Sequence[str] | None) -> bool:
    if extensions is not None:
        return extension in extensions
    bare = extension.removesuffix(".gz")
    return bare in TEXT_EXTENSIONS or (bare in RECORD_EXTENSIONS and extension != "parquet.gz")


def _note_splits(paths: Iterable[str], folder: Path, left_out: LeftOut) -> None:
    """Tell of train and test side by side; of texts the folders alone say so: a test.py is none."""
    splits = {match for path in set(paths) for match in _SPLIT.findall(path.lower())}
    if len(splits) > 1:
        left_out.notes.append(f"{folder}: {', '.join(sorted(splits))} are read together; name one to keep them apart")


def _num_bytes(files: list[InputFile]) -> int:
    return sum(file.num_bytes for file in files)


def is_about(path: Path) -> bool:
    """Whether a file is about those beside it, by its name: a README, a licence."""
    name = path.name.lower()
    return name.startswith(ABOUT) and (not name.startswith("_") or "." not in name)


def _leave_out(paths: Sequence[str | os.PathLike[str]], reason: str, left_out: LeftOut) -> None:
    for path in paths:
        left_out.add(reason, path)
