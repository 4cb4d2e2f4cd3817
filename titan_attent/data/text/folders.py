"""Decides which files of a folder are read: its records, or else its texts; and counts the other files by reason.

In a folder with record files (.parquet, .jsonl, .ndjson, .json), these are read. The files beside them, such as a
README, a licence or a script, are left out. Only if there are fewer record files than texts, in number and in bytes,
are the texts read and the records left out. Tables (.csv, .tsv) are read if there is nothing else to read: beside
other files they often describe these. A folder with more files left out than read is refused (inputs.py).

Cost: two listings of each folder, one stat per file that is read, and one read of the head of each .json file.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from titan_attent.data.io.walk import FolderWalk, LeftOut
from titan_attent.data.text.compressed import bare_extension
from titan_attent.data.text.input_files import (
    RECORD_EXTENSIONS,
    TEXT_EXTENSIONS,
    InputFile,
    extension_of,
    input_file,
    kind_of,
)

METADATA_NAMES = (
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
"""Beginnings of the names of metadata files, in lower case; "_" counts only for names without an extension."""
_SPLIT = re.compile(r"(?<![a-z])(train|test|val|dev)(?:ing|id|idation)?(?![a-z])")
OTHER_EXTENSION, BESIDE_RECORDS, BESIDE_TEXTS = "of another extension", "beside records", "records beside texts"


def list_folder(
    folder: Path, *, source: str, extensions: Sequence[str] | None, text_key: str, left_out: LeftOut
) -> list[InputFile]:
    """The files of ``folder`` that are read, by path; ``left_out`` counts the others.

    Args:
        extensions: the extensions to read (``txt``), for records and texts; None for the rule above.
    """
    walk = FolderWalk(folder)
    walk.drop_copies(lambda path: _is_read(extension_of(Path(path)), extensions))
    left_out.update(walk.left_out)
    records: list[InputFile] = []
    texts: list[InputFile] = []
    tables: list[InputFile] = []
    unread: list[Path] = []
    # Sorted by path string, independent of the order of the walk.
    for path in sorted(map(Path, walk.files()), key=lambda path: path.as_posix()):
        extension = extension_of(path)
        if not _is_read(extension, extensions):
            unread.append(path)
            continue
        kind = kind_of(path, extension=extension, text_key=text_key)
        files = {"text": texts, "table": tables}.get(kind, records)
        files.append(input_file(path, source=source, optional=True, kind=kind))
    plain = [file for file in texts if not is_metadata(file.path)]
    if not records and plain and all(bare_extension(file.extension) == "json" for file in plain):
        # Only .json files: these are records with another key, not texts. The reader then asks for the key.
        records = [file._replace(kind="values") for file in plain]
        texts = [file for file in texts if is_metadata(file.path)]
        plain = []
    if extensions is None and (records or plain):
        unread = sorted([*unread, *(file.path for file in tables)], key=lambda path: path.as_posix())
    else:
        records += tables
    if extensions is not None:
        _leave_out(unread, OTHER_EXTENSION, left_out)
        return sorted(records + texts, key=lambda file: file.path.as_posix())
    fewer = len(records) < len(plain) and _num_bytes(records) < _num_bytes(plain)
    if not records or fewer:
        _leave_out(unread, OTHER_EXTENSION, left_out)
        _leave_out([file.path for file in records], BESIDE_TEXTS, left_out)
        _note_splits((str(Path(os.path.relpath(file.path, folder)).parent) for file in texts), folder, left_out)
        return texts
    # Leaving out metadata loses no data; neither do other files if they are few, or small.
    beside = [file.path for file in texts] + unread
    data = [path for path in beside if not is_metadata(path)]
    many = len(data) > len(records) and sum(path.stat().st_size for path in data) > _num_bytes(records)
    _leave_out(beside, BESIDE_RECORDS, left_out)
    _note_splits((os.path.relpath(file.path, folder) for file in records), folder, left_out)
    if not many:
        left_out.harmless.add(BESIDE_RECORDS)
    return records


def _is_read(extension: str, extensions: Sequence[str] | None) -> bool:
    if extensions is not None:
        return extension in extensions
    bare = bare_extension(extension)
    return bare in TEXT_EXTENSIONS or (bare in RECORD_EXTENSIONS and (bare != "parquet" or bare == extension))


def _note_splits(paths: Iterable[str], folder: Path, left_out: LeftOut) -> None:
    """Note if the paths name several splits, such as train and test. Texts give folders only: test.py is no split."""
    splits = {match for path in set(paths) for match in _SPLIT.findall(path.lower())}
    if len(splits) > 1:
        left_out.notes.append(f"{folder}: {', '.join(sorted(splits))} are read together; name one to read it alone")


def _num_bytes(files: list[InputFile]) -> int:
    return sum(file.num_bytes for file in files)


def is_metadata(path: Path) -> bool:
    """Whether a file is metadata of the files beside it, such as a README or a licence, by its name."""
    name = path.name.lower()
    return name.startswith(METADATA_NAMES) and (not name.startswith("_") or "." not in name)


def _leave_out(paths: Sequence[str | os.PathLike[str]], reason: str, left_out: LeftOut) -> None:
    for path in paths:
        extension = extension_of(Path(path))
        left_out.add_file(reason, path, extension=f".{extension}" if extension else "without extension")
