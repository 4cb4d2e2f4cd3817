"""The token files of the inputs: each file is recognised by one format, and nothing is read twice.

Cost: one open per file, and what its format reads (data/formats/).
"""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from titan_attent.data.adopt.options import OWN_FILES, Options, Places
from titan_attent.data.formats import raw
from titan_attent.data.formats.table import FORMATS, Format
from titan_attent.data.formats.token_file import TOKEN_DTYPES, Hints, TokenFile, bad, file_size
from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.io.walk import FolderWalk, LeftOut, by_count

_HELD_OUT = re.compile(r"(^|[^a-z])(val|valid|validation|test|eval)([^a-z]|$)", re.IGNORECASE)
"""In the names of files that are not training data."""


class Found(NamedTuple):
    """A token file, its data source, and the name of its format."""

    source: str
    format: str
    file: TokenFile


def find_files(
    inputs: Sequence[tuple[str, Path]], options: Options, *, where: Places, left_out: LeftOut
) -> list[Found]:
    """The token files of all inputs, in their order; those of a folder by path.

    Args:
        inputs: (source, file or folder).
        where: the places of the data set.
        left_out: what is not read is counted here.

    Raises:
        ValueError: there is none, files of several formats or splits are mixed, or a header does not fit its file.
    """
    hints = Hints(
        dtype=TOKEN_DTYPES[options.dtype] if options.dtype else None,
        column=options.column,
        decompressed=Path(options.decompress) if options.decompress else None,
        root=where.root,
    )
    if hints.decompressed is not None and not _is_below(hints.decompressed, where.root):
        raise ValueError(f"--decompress {options.decompress}: is not below {where.root}, the root of the data set")
    found: list[Found] = []
    for source, path in inputs:
        paths = [one for one in _paths(path, options, left_out) if not _is_own(one, where, hints)]
        entries = _entries(paths, options, left_out)
        if not entries:
            known = ", ".join(f"{one.TITLE} ({name})" for name, one in FORMATS.items())
            raise ValueError(f"{path}: no token files found; known are {known}. {left_out.summary()}".rstrip())
        _check_one_format(path, entries)
        files: list[Found] = []
        for form, entry in entries:
            opened = form.open_files(entry, hints)
            if not opened:
                raise bad(entry, "names no file of tokens", "copy the folder again, or leave it out with --include")
            files += [Found(source, form.NAME, file) for file in opened]
        if not options.include:
            _check_splits(path, files)
        found += files
    dtypes = {one.file.dtype: one.file.path for one in found}
    if len(dtypes) > 1:
        (first, one_file), (second, other_file) = list(dtypes.items())[:2]
        raise ValueError(
            f"{other_file}: its tokens are {second}, those of {one_file} {first}; a data set has one dtype: adopt two"
        )
    repeated = Counter(os.path.abspath(one.file.path) for one in found).most_common(1)
    if repeated and repeated[0][1] > 1:
        raise ValueError(f"{repeated[0][0]}: is in several inputs; name it once")
    return _with_masks(found, options) if options.label_masks else found


def _is_below(path: Path, root: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def _is_own(path: Path, where: Places, hints: Hints) -> bool:
    """Whether an earlier adoption wrote this file: beside the index, or as a decompressed copy."""
    if hints.decompressed is not None and _is_below(path, hints.decompressed):
        return True
    is_beside = os.path.abspath(path.parent) == os.path.abspath(where.folder)
    return is_beside and path.name.startswith(OWN_FILES)


def _paths(path: Path, options: Options, left_out: LeftOut) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; correct the path")
    walk = FolderWalk(path)
    walk.drop_copies(lambda name: True)
    left_out.update(walk.left_out)
    paths = [Path(name) for name in walk.files()]
    if options.include:
        return [one for one in paths if fnmatch.fnmatch(str(one.relative_to(path)), options.include)]
    return paths


def _entries(paths: Sequence[Path], options: Options, left_out: LeftOut) -> list[tuple[Format, Path]]:
    """(format, path) of every file by which a format is recognised."""
    forms = [FORMATS[options.format]] if options.format else list(FORMATS.values())
    sniffed = {path: next((form for form in forms if form.is_entry(path)), None) for path in paths}
    if any(form in (FORMATS["mds"], FORMATS["litdata"], FORMATS["megatron"]) for form in sniffed.values()):
        # Their tokens are in files that look bare.
        sniffed = {
            path: None if form is FORMATS[raw.NAME] and not options.format else form for path, form in sniffed.items()
        }
    companions = tuple(ending for form in FORMATS.values() for ending in form.COMPANIONS)
    for path, form in sniffed.items():
        if form is None and not path.name.endswith(companions):
            left_out.add_file("of no format", path, extension=path.suffix or "no extension")
    return [(form, path) for path, form in sniffed.items() if form is not None]


def _check_one_format(path: Path, entries: Sequence[tuple[Format, Path]]) -> None:
    counts = Counter(form.NAME for form, _ in entries)
    if len(counts) > 1:
        raise ValueError(
            f"{path}: holds files of several formats, {by_count(counts)}; choose one with --format, or name files with "
            "--include PATTERN"
        )


def _check_splits(path: Path, files: Sequence[Found]) -> None:
    held_out = [one.file.path for one in files if _HELD_OUT.search(_below(one.file.path, path))]
    if held_out and len(held_out) < len(files):
        raise ValueError(
            f"{path}: holds validation files ({held_out[0].name}, {len(held_out)} in all) beside others; adopt each "
            "split as a data set of its own, by --include PATTERN, such as '*train*', with --output and --root; "
            "'*' takes all"
        )


def _below(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder) if folder.is_dir() else path.name


def _with_masks(found: Sequence[Found], options: Options) -> list[Found]:
    """The files with the masks that the user names, one byte per token, paired by their order."""
    masks: list[Path] = []
    for _, path in parse_inputs([options.label_masks]):
        masks += [Path(name) for name in FolderWalk(path).files()] if path.is_dir() else [path]
    if len(masks) != len(found):
        raise ValueError(
            f"--label-masks {options.label_masks}: {len(masks)} files for {len(found)} token files; there must be one "
            "for each, in the same order"
        )
    for mask, one in zip(masks, found, strict=True):
        if file_size(mask) != one.file.num_tokens:
            raise bad(
                mask,
                f"has {file_size(mask)} bytes, not one per token of {one.file.path} ({one.file.num_tokens})",
                "check that both lists have one order",
            )
    return [one._replace(file=replace(one.file, mask=mask)) for one, mask in zip(found, masks, strict=True)]
