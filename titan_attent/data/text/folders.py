"""Decides which files of a folder are read: its records, or else its texts; and counts the other files by reason.

In a folder with record files (.parquet, .jsonl, .ndjson, .json), these are read. The files beside them, such as a
README, a licence or a script, are left out. Only if there are fewer record files than texts, in number and in bytes,
are the texts read and the records left out. Tables (.csv, .tsv) are read if there is nothing else to read: beside
other files they often describe these. Arrow files are read if there are no tables either: beside other files they often
are copies of these. A folder with more files left out than read is refused (inputs.py).

Cost: two listings of each folder, one stat per file that is read, and one read of the head of each .json file.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from titan_attent.data.io.remote import InputPath, RemotePath
from titan_attent.data.io.walk import HIDDEN, FolderWalk, LeftOut
from titan_attent.data.text.compressed import bare_extension
from titan_attent.data.text.input_files import (
    COLUMN_EXTENSIONS,
    RECORD_EXTENSIONS,
    TEXT_EXTENSIONS,
    InputFile,
    extension_of,
    input_file,
    kind_of,
)
from titan_attent.data.text.records import Records

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
_CACHE = re.compile(r"(cache-[0-9a-f]+|tmp).*\.arrow")
"""Files that ``datasets`` leaves beside its data: results of ``map``, with the same rows once more."""
OTHER_EXTENSION, BESIDE_RECORDS, BESIDE_TEXTS = "of another extension", "beside records", "records beside texts"
CACHE = "caches of datasets"


def list_folder(
    folder: InputPath, *, source: str, extensions: Sequence[str] | None, records: Records, left_out: LeftOut
) -> list[InputFile]:
    """The files of ``folder`` that are read, by path; ``left_out`` counts the others.

    Args:
        extensions: the extensions to read (``txt``), for records and texts; None for the rule above.
        records: the keys of the text.
    """
    by_kind: dict[str, list[InputFile]] = {"records": [], "text": [], "table": [], "arrow": []}
    unread: list[InputPath] = []
    for path in walk(folder, extensions=extensions, left_out=left_out):
        extension = extension_of(path)
        if not _is_read(extension, extensions):
            unread.append(path)
            continue
        if extensions is None and _CACHE.fullmatch(path.name):
            leave_out([path], CACHE, left_out)
            left_out.harmless.add(CACHE)
            continue
        kind = kind_of(path, extension=extension, records=records)
        by_kind[kind if kind in by_kind else "records"].append(
            input_file(path, source=source, optional=True, kind=kind)
        )
    return _chosen(folder, by_kind, unread, extensions=extensions, left_out=left_out)


def walk(folder: InputPath, *, extensions: Sequence[str] | None, left_out: LeftOut) -> list[InputPath]:
    """The files below ``folder`` by path, without hidden ones and copies of files that are read."""
    if isinstance(folder, RemotePath):
        found: list[InputPath] = []
        for remote in folder.files():
            hidden = any(part.startswith(".") or part == "__pycache__" for part in _below(remote, folder).split("/"))
            if hidden:
                left_out.add(HIDDEN, str(remote))
            else:
                found.append(remote)
        return found
    one = FolderWalk(folder)
    one.drop_copies(lambda path: _is_read(extension_of(Path(path)), extensions))
    left_out.update(one.left_out)
    # Sorted by path string, independent of the order of the walk.
    return sorted(map(Path, one.files()), key=lambda path: path.as_posix())


def _below(path: InputPath, folder: InputPath) -> str:
    if isinstance(path, Path):
        return os.path.relpath(path, str(folder))
    return path.as_posix().removeprefix(folder.as_posix().rstrip("/")).lstrip("/")


def _chosen(
    folder: InputPath,
    by_kind: dict[str, list[InputFile]],
    unread: list[InputPath],
    *,
    extensions: Sequence[str] | None,
    left_out: LeftOut,
) -> list[InputFile]:
    """The files of a folder that are read, of those that could be."""
    records, texts, tables, arrow = (by_kind[kind] for kind in ("records", "text", "table", "arrow"))
    plain = [file for file in texts if not is_metadata(file.path)]
    if not records and plain and all(bare_extension(file.extension) == "json" for file in plain):
        # Only .json files: these are records with another key, not texts. The reader then asks for the key.
        records = [file._replace(kind="values") for file in plain]
        texts = [file for file in texts if is_metadata(file.path)]
        plain = []
    if extensions is not None:
        leave_out(unread, OTHER_EXTENSION, left_out)
        return sorted([*records, *texts, *tables, *arrow], key=lambda file: file.path.as_posix())
    others = [*tables, *arrow]
    if not records and not plain:
        records = tables or arrow
        others = arrow if tables else []
    unread = sorted([*unread, *(file.path for file in others)], key=lambda path: path.as_posix())
    fewer = len(records) < len(plain) and _num_bytes(records) < _num_bytes(plain)
    if not records or fewer:
        leave_out(unread, OTHER_EXTENSION, left_out)
        leave_out([file.path for file in records], BESIDE_TEXTS, left_out)
        _note_splits((_below(file.path, folder).rpartition("/")[0] for file in texts), folder, left_out)
        return texts
    # Leaving out metadata loses no data; neither do other files if they are few, or small.
    beside = [file.path for file in texts] + unread
    data = [path for path in beside if not is_metadata(path)]
    many = len(data) > len(records) and sum(path.stat().st_size for path in data) > _num_bytes(records)
    leave_out(beside, BESIDE_RECORDS, left_out)
    _note_splits((_below(file.path, folder) for file in records), folder, left_out)
    if not many:
        left_out.harmless.add(BESIDE_RECORDS)
    return records


def _is_read(extension: str, extensions: Sequence[str] | None) -> bool:
    if extensions is not None:
        return extension in extensions
    bare = bare_extension(extension)
    return bare in TEXT_EXTENSIONS or (
        bare in RECORD_EXTENSIONS and (bare not in COLUMN_EXTENSIONS or bare == extension)
    )


def _note_splits(paths: Iterable[str], folder: InputPath, left_out: LeftOut) -> None:
    """Note if the paths name several splits, such as train and test. Texts give folders only: test.py is no split."""
    splits = {match for path in set(paths) for match in _SPLIT.findall(path.lower())}
    if len(splits) > 1:
        left_out.notes.append(f"{folder}: {', '.join(sorted(splits))} are read together; name one to read it alone")


def _num_bytes(files: list[InputFile]) -> int:
    return sum(file.num_bytes for file in files)


def is_metadata(path: InputPath) -> bool:
    """Whether a file is metadata of the files beside it, such as a README or a licence, by its name."""
    name = path.name.lower()
    return name.startswith(METADATA_NAMES) and (not name.startswith("_") or "." not in name)


def leave_out(paths: Sequence[InputPath], reason: str, left_out: LeftOut) -> None:
    for path in paths:
        extension = extension_of(path)
        left_out.add_file(reason, str(path), extension=f".{extension}" if extension else "without extension")
