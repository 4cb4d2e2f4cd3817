"""Inputs of the image writer: what kind of thing each is."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from titan_attent.data.images.arrays import ArraysInput
from titan_attent.data.images.examples import Bad, Example, Input, Label, Limits
from titan_attent.data.images.folders import FolderInput
from titan_attent.data.images.file_types import describe, is_beside, kind_of_archive
from titan_attent.data.images.splits import file_splits
from titan_attent.data.images.tables import TableInput
from titan_attent.data.images.tars import TarInput
from titan_attent.data.io.walk import FolderWalk

_LIMITS = Limits()
_READERS: dict[str, Callable[..., Input]] = {
    ".parquet": TableInput,
    ".npz": ArraysInput,
    ".tar": TarInput,
    ".tar.gz": TarInput,
    ".tgz": TarInput,
}
_OF_FOLDERS = (".parquet", ".tar", ".tar.gz", ".tgz")


def open_inputs(
    inputs: Sequence[tuple[str, Path]],
    *,
    keys: tuple[str, str] | None = None,
    limits: Limits = _LIMITS,
    all_splits: bool = False,
) -> list[tuple[str, Input]]:
    """Source and input of each source and path; a folder of .parquet or tar files is as many, by name.

    Args:
        keys: names of what holds images and labels: columns, arrays, or (the second) a key of JSON in a tar file.
        limits: what is above them is not read into memory.
        all_splits: read train and test side by side, too.

    Raises:
        ValueError: a path is missing or of unknown kind, its file cannot be read, or a folder holds several splits.
    """
    opened: list[tuple[str, Input]] = []
    for source, path in inputs:
        if path.is_dir():
            files = sorted(
                file for file in path.iterdir() if kind_of_archive(file.name) in _OF_FOLDERS and file.is_file()
            )
            if not files:
                opened.append((source, FolderInput(path, limits=limits, all_splits=all_splits)))
                continue
            if not all_splits and (splits := file_splits(file.name for file in files)):
                raise ValueError(
                    f"{path}: its files {', '.join(splits[:5])} are of several splits of a data set; name those to "
                    f"write by a pattern, such as '{path}/*train*', or, if all are to be read, add --all-splits"
                )
            beside = BesideArchives(path, files)
            for file in beside.files:
                opened.append((source, _READERS[kind_of_archive(file.name)](file, keys=keys, limits=limits)))
            opened.append((source, beside))
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder; correct the path of this input")
        elif kind := kind_of_archive(path.name):
            opened.append((source, _READERS[kind](path, keys=keys, limits=limits)))
        else:
            raise ValueError(
                f"{path}: unsupported kind of file; give .parquet, .npz, .tar or .tar.gz files, or a folder that has a "
                "folder of images for each class"
            )
    return opened


class BesideArchives:
    """What a folder holds beside the .parquet and tar files that are read: no image, but a count.

    Args:
        files: of it that are read, but for links to others of them; they count as ``num_images`` here.
    """

    holds_files = True
    ordered = False
    names = ()

    def __init__(self, path: Path, files: Sequence[Path]):
        walk = FolderWalk(path)
        read = {os.path.join(walk.root, file.name) for file in files}
        copies = walk.drop_copies(read.__contains__)
        self.files = [file for file in files if os.path.join(walk.root, file.name) not in copies]
        self.path, self.num_images, self.num_unread = path, len(self.files), 0
        self.left_out = walk.left_out
        for file in walk.files():
            if file not in read:
                self.left_out.add(describe(file), file)
                self.num_unread += not is_beside(file)

    def labels(self) -> Iterator[Label]:
        return iter(())

    def examples(self) -> Iterator[Example | Bad]:
        return iter(())


def check_unread(item: Input, *, num_images: int) -> None:
    """ValueError if what may be images and is not read is more than the images of an input."""
    if item.num_unread > num_images:
        raise ValueError(
            f"{item.path}: most of it is not read, {item.left_out.summary()}, beside {num_images:,} images or files "
            "that are; give what is to be read alone, convert the rest, or go on without it by --on-bad skip"
        )
