"""Opens the inputs of the image writer, each with the reader for its format."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from titan_attent.data.images.arrays import ArraysInput
from titan_attent.data.images.examples import Bad, Example, Input, Label, Limits
from titan_attent.data.images.file_types import archive_extension, file_type, is_sidecar
from titan_attent.data.images.folders import FolderInput
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
_READ_IN_FOLDERS = (".parquet", ".tar", ".tar.gz", ".tgz")


def open_inputs(
    inputs: Sequence[tuple[str, Path]],
    *,
    keys: tuple[str, str] | None = None,
    limits: Limits = _LIMITS,
    all_splits: bool = False,
) -> list[tuple[str, Input]]:
    """Open each (source, path) as (source, input). A folder of .parquet or tar files gives one input per file, by name.

    Args:
        keys: names of the columns or arrays of images and labels; for tar files the second is a key of the JSON.
        limits: images above these limits are not read into memory.
        all_splits: allow files or folders named train, test, ... side by side.

    Raises:
        ValueError: a path is missing, unreadable or of an unknown format, or a folder holds several splits.
    """
    opened: list[tuple[str, Input]] = []
    for source, path in inputs:
        if path.is_dir():
            files = sorted(
                file for file in path.iterdir() if archive_extension(file.name) in _READ_IN_FOLDERS and file.is_file()
            )
            if not files:
                opened.append((source, FolderInput(path, limits=limits, all_splits=all_splits)))
                continue
            if not all_splits and (splits := file_splits(file.name for file in files)):
                raise ValueError(
                    f"{path}: its files {', '.join(splits[:5])} are of several splits of a data set; select the "
                    f"files to write by a pattern, such as '{path}/*train*', or add --all-splits to read all of them"
                )
            other_files = NonArchiveFiles(path, files)
            for file in other_files.archives:
                opened.append((source, _READERS[archive_extension(file.name)](file, keys=keys, limits=limits)))
            opened.append((source, other_files))
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder; correct the path of this input")
        elif ending := archive_extension(path.name):
            opened.append((source, _READERS[ending](path, keys=keys, limits=limits)))
        else:
            raise ValueError(
                f"{path}: unsupported file format; give .parquet, .npz, .tar or .tar.gz files, or a folder with one "
                "folder of images per class"
            )
    return opened


class NonArchiveFiles:
    """The files of a folder that are not read because it holds .parquet or tar files. Has no examples, only counts.

    Attributes:
        archives: the .parquet and tar files of the folder, without links to one another.
        num_images: number of ``archives``, which ``num_unread`` is compared with.
    """

    holds_files = True
    ordered = False
    names = ()

    def __init__(self, path: Path, archives: Sequence[Path]):
        walk = FolderWalk(path)
        read = {os.path.join(walk.root, file.name) for file in archives}
        copies = walk.drop_copies(read.__contains__)
        self.archives = [file for file in archives if os.path.join(walk.root, file.name) not in copies]
        self.path, self.num_images, self.num_unread = path, len(self.archives), 0
        self.left_out = walk.left_out
        for file in walk.files():
            if file not in read:
                self.left_out.add(file_type(file), file)
                self.num_unread += not is_sidecar(file)

    def labels(self) -> Iterator[Label]:
        return iter(())

    def examples(self) -> Iterator[Example | Bad]:
        return iter(())


def check_unread(item: Input, *, num_images: int) -> None:
    """Raise a ValueError if an input has more unread files that may be images than images."""
    if item.num_unread > num_images:
        raise ValueError(
            f"{item.path}: most of it is not read, {item.left_out.summary()}, and only {num_images:,} images or files "
            "are read; give only the part to read, convert the other files, or skip them with --on-bad skip"
        )
