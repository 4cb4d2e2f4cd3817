"""Folders that hold one folder of images per class.

Cost: the folder is listed once before anything is written, and once more while it is read. The names of its folders
are in memory, the names of its files are not.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from titan_attent.data.images.examples import Bad, Example, Label, Limits
from titan_attent.data.images.file_types import IMAGE_EXTENSIONS, file_type, is_archive, is_image, is_sidecar
from titan_attent.data.images.splits import folder_splits
from titan_attent.data.io.walk import DEAD, SPECIAL, FolderWalk, LeftOut


class FolderInput:
    """A folder that holds one folder per class, with the images of the class at any depth; hidden files are left out.

    Each real folder is read once, even if several links lead to it (:mod:`titan_attent.data.io.walk`). Files with other
    extensions than ``IMAGE_EXTENSIONS`` are counted.

    Args:
        limits: limits of an image file.
        all_splits: whether folders named train, test, ... are classes.

    Raises:
        ValueError: it has no folder, or holds folders of splits side by side.
    """

    holds_files = True
    ordered = False

    def __init__(self, path: Path, *, limits: Limits, all_splits: bool = False):
        self.path, self.limits = path, limits
        self._walk = FolderWalk(path)
        self._walk.drop_copies(is_image)
        folders = self._walk.folders()
        if not folders:
            archives = sorted(entry.name for entry in os.scandir(path) if is_archive(entry.name))
            give = f"give {path / archives[0]}, or " if archives else "give "
            raise ValueError(f"{path}: has no folder in it; {give}a folder with one folder of images per class")
        self.left_out, self.num_unread, self.num_images = LeftOut(), 0, 0
        self._unread: dict[str, str] = {}  # class -> a file of it that is not read and may be an image
        subfolders: dict[str, set[str]] = defaultdict(set)  # folder -> names of its folders that hold images
        self.names = []
        for name in folders:
            before = self.num_images
            for file in self._walk.files(name):
                if is_image(file):
                    self.num_images += 1
                    _add_ancestors(subfolders, root=str(path), folder=os.path.dirname(file))
                else:
                    self._leave_out(file, class_name=name)
            if self.num_images > before:
                self.names.append(name)
        self._stray = []
        for file in takewhile(lambda file: os.path.dirname(file) == str(path), self._walk.files()):
            if is_image(file):
                self._stray.append(file)
            else:
                self._leave_out(file, class_name="")
        self._empty = [name for name in folders if name not in set(self.names)]
        self.left_out.update(self._walk.left_out)
        self._dead = [file for file in self._walk.dead if is_image(file)]
        for file in self._walk.dead:
            if is_image(file):  # examples() reports it as bad
                self.left_out.counts[DEAD if os.path.islink(file) else SPECIAL] -= 1
            else:
                self.num_unread += not is_sidecar(file)
        self.left_out.counts = +self.left_out.counts
        if not all_splits:
            self._check_splits(subfolders)

    def _leave_out(self, file: str, *, class_name: str) -> None:
        self.left_out.add(file_type(file), file)
        if not is_sidecar(file):
            self.num_unread += 1
            first = self._unread.get(class_name)
            if first is None or (is_archive(file) and not is_archive(first)):
                self._unread[class_name] = file

    def _check_splits(self, subfolders: dict[str, set[str]]) -> None:
        for folder, names in sorted(subfolders.items()):
            if splits := folder_splits(names, top=folder == str(self.path)):
                split = next((name for name in splits if "train" in name.lower()), splits[0])
                raise ValueError(
                    f"{folder}: its folders {', '.join(splits[:5])} are splits of a data set, not classes; give the "
                    f"one to write, such as {os.path.join(folder, split)}, or add --all-splits to read all of them as "
                    "classes"
                )

    def labels(self) -> Iterator[Label]:
        return iter(self.names)

    def examples(self) -> Iterator[Example | Bad]:
        for name in self._empty:
            unread = self._unread.get(name)
            archive = unread if unread and is_archive(unread) else None
            fix = f"give {os.path.dirname(archive)} as the input" if archive else "fill or remove it"
            but = f", but {file_type(unread)}" if unread else ""
            problem = f"this class folder has no image ({', '.join(IMAGE_EXTENSIONS)}){but}"
            yield Bad(str(self.path / name), "class", problem, fix)
        for file in self._stray:
            yield Bad(file, "label", "an image outside of the class folders", "move or remove it")
        for file in self._dead:
            yield self._read(file, "")
        for name in self.names:
            for file in self._walk.files(name):
                if is_image(file):
                    yield self._read(file, name)

    def _read(self, path: str, label: str) -> Example | Bad:
        try:
            with open(path, "rb", opener=_open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return Bad(path, "undecodable", "cannot be read (a pipe, device or socket)", "replace or remove it")
                if status.st_size > self.limits.file_bytes:
                    problem = f"has {status.st_size:,} bytes, more than {self.limits.file_bytes:,}, the limit"
                    return Bad(path, "large", problem, "remove it, or raise --max-file-bytes")
                return Example(path, file.read(), label)
        except OSError as error:
            return Bad(path, "undecodable", f"cannot be read ({error.strerror or error})", "fix or remove it")


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe is opened without waiting for its other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _add_ancestors(subfolders: dict[str, set[str]], *, root: str, folder: str) -> None:
    """Add ``folder`` and each folder above it, up to ``root``, to the subfolders of its parent."""
    while folder != root:
        parent, name = os.path.split(folder)
        if name in subfolders[parent]:
            return
        subfolders[parent].add(name)
        folder = parent
