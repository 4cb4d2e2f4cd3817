"""Folders with a folder of images a class.

Cost: what is in the folder is listed before anything is written, and again as it is read; in memory are the names of
its folders.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from titan_attent.data.images.examples import Bad, Example, Label, Limits
from titan_attent.data.images.file_types import IMAGE_EXTENSIONS, describe, is_archive, is_beside, is_image
from titan_attent.data.images.splits import folder_splits
from titan_attent.data.io.walk import DEAD, SPECIAL, FolderWalk, LeftOut


class FolderInput:
    """A folder that has a folder of images, or of folders of them, for each class; hidden ones are left out.

    Each real folder is read once, links or not (:mod:`titan_attent.data.io.walk`). Files of another extension than
    ``IMAGE_EXTENSIONS`` are counted.

    Args:
        limits: of an image file.
        all_splits: folders named train and test are classes, too.

    Raises:
        ValueError: it has no folder, or folders of splits beside each other.
    """

    holds_files = True
    ordered = False

    def __init__(self, path: Path, *, limits: Limits, all_splits: bool = False):
        self.path, self.limits = path, limits
        self._walk = FolderWalk(path)
        self._walk.drop_copies(is_image)
        folders = self._walk.folders()
        if not folders:
            held = sorted(entry.name for entry in os.scandir(path) if is_archive(entry.name))
            give = f"give {path / held[0]}, or " if held else "give "
            raise ValueError(f"{path}: has no folder in it; {give}a folder that has a folder of images for each class")
        self.left_out, self.num_unread, self.num_images = LeftOut(), 0, 0
        self._others: dict[str, str] = {}  # a class without an image, and a file of it that may be one
        inner: dict[str, set[str]] = defaultdict(set)  # folders with images in each
        self.names = []
        for name in folders:
            before = self.num_images
            for file in self._walk.files(name):
                if is_image(file):
                    self.num_images += 1
                    _note(inner, root=str(path), folder=os.path.dirname(file))
                else:
                    self._leave_out(file, of=name)
            if self.num_images > before:
                self.names.append(name)
        self._stray = []
        for file in takewhile(lambda file: os.path.dirname(file) == str(path), self._walk.files()):
            if is_image(file):
                self._stray.append(file)
            else:
                self._leave_out(file, of="")
        self._empty = [name for name in folders if name not in set(self.names)]
        self.left_out.update(self._walk.left_out)
        self._dead = [file for file in self._walk.dead if is_image(file)]
        for file in self._walk.dead:
            if is_image(file):  # which is told as bad
                self.left_out.counts[DEAD if os.path.islink(file) else SPECIAL] -= 1
            else:
                self.num_unread += not is_beside(file)
        self.left_out.counts = +self.left_out.counts
        if not all_splits:
            self._check_splits(inner)

    def _leave_out(self, file: str, *, of: str) -> None:
        self.left_out.add(describe(file), file)
        if not is_beside(file):
            self.num_unread += 1
            if of not in self._others or (is_archive(file) and not is_archive(self._others[of])):
                self._others[of] = file

    def _check_splits(self, inner: dict[str, set[str]]) -> None:
        for folder, names in sorted(inner.items()):
            if splits := folder_splits(names, top=folder == str(self.path)):
                one = next((name for name in splits if "train" in name.lower()), splits[0])
                raise ValueError(
                    f"{folder}: its folders {', '.join(splits[:5])} are splits of a data set, not classes; name the "
                    f"one to write, such as {os.path.join(folder, one)}, or, if all of them are to be read as "
                    "classes, add --all-splits"
                )

    def labels(self) -> Iterator[Label]:
        return iter(self.names)

    def examples(self) -> Iterator[Example | Bad]:
        for name in self._empty:
            other = self._others.get(name)
            held = other if other and is_archive(other) else None
            mend = f"give {os.path.dirname(held)} as the input" if held else "fill or remove it"
            but = f", but {describe(other)}" if other else ""
            problem = f"this class folder has no image ({', '.join(IMAGE_EXTENSIONS)}){but}"
            yield Bad(str(self.path / name), "class", problem, mend)
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
            with open(path, "rb", opener=_open_at_once) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    return Bad(path, "undecodable", "cannot be read (a pipe, device or socket)", "mend or remove it")
                if found.st_size > self.limits.file_bytes:
                    problem = f"has {found.st_size:,} bytes, more than the {self.limits.file_bytes:,} that may be"
                    return Bad(path, "large", problem, "remove it, or raise --max-file-bytes")
                return Example(path, file.read(), label)
        except OSError as error:
            return Bad(path, "undecodable", f"cannot be read ({error.strerror or error})", "mend or remove it")


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _note(inner: dict[str, set[str]], *, root: str, folder: str) -> None:
    """Remember each folder on the way from ``root`` to ``folder`` in the one above."""
    while folder != root:
        above, name = os.path.split(folder)
        if name in inner[above]:
            return
        inner[above].add(name)
        folder = above
