"""Files of a folder in a fixed order, each real folder once; and the count of what an input holds that is not read.

Symbolic links to folders are followed. A folder that is reached in several ways is read once: where it really stands,
if that is inside the folder walked, else behind the first of its links; so a link upwards, sideways or to itself
gives no copy, and one to a folder around the root nothing. Files are read once, too, if copies are dropped. Hidden
entries, links to nothing and what is no regular file are left out, and counted.

Cost: every folder is listed twice, the first time to learn which links to follow, and once more where links lead to
files; memory for folders and for links, not for files.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HIDDEN, AGAIN, DEAD, SPECIAL = "hidden", "linked twice", "dead link", "not a file"
"""Reasons of a walk: a dot in front, or a cache; what is read elsewhere; a link to nothing; a pipe or device."""
UNCOUNTED = (HIDDEN, AGAIN)
"""Reasons that take nothing from what is read: they never make up the greater part of an input."""


class LeftOut:
    """Counts what an input holds and is not read, by reason, with the first of each.

    Attributes:
        harmless: reasons that take nothing from what is read.
        notes: what else is to be told of an input.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.harmless = set(UNCOUNTED)
        self.notes: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.counts or self.notes)

    def add(self, reason: str, where: str | os.PathLike[str], count: int = 1) -> None:
        self.counts[reason] += count
        self.first.setdefault(reason, os.fspath(where))

    def update(self, other: "LeftOut") -> None:
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}
        self.harmless |= other.harmless
        self.notes += other.notes

    @property
    def num_counted(self) -> int:
        """All but those for reasons that take nothing from what is read."""
        return sum(count for reason, count in self.counts.items() if reason not in self.harmless)

    def summary(self) -> str:
        """``left out 12 hidden (first: a/.git), 3 dead link (first: a/b)``; "" where there is nothing to tell."""
        parts = [f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in sorted(self.counts.items())]
        return "; ".join((["left out " + ", ".join(parts)] if parts else []) + self.notes)


class FolderWalk:
    """The files below ``root``, without hidden ones.

    Attributes:
        left_out: what the walk itself leaves out, for the reasons above.
        dead: paths of the links to nothing and of what is no file among it.

    Raises:
        OSError: a folder cannot be listed.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        self.left_out = LeftOut()
        self.dead: list[str] = []
        self._followed: set[str] = set()
        self._links: list[str] = []
        self._copies: set[str] = set()
        # In rounds: all that really stands in a round's folders goes before what their links lead to.
        # Folders around the root count as seen: no link leads out of it by them.
        seen = {_identity(str(folder)) for folder in Path(root).resolve().parents}
        starts = [self.root]
        while starts:
            links: list[str] = []
            for start in starts:
                identity = _identity(start)
                if identity in seen:
                    self.left_out.add(AGAIN, start)
                    continue
                if start is not self.root:
                    self._followed.add(start)
                self._survey(start, seen, links)
            starts = links

    def _survey(self, start: str, seen: set[tuple[int, int]], links: list[str]) -> None:
        """Count and remember all below ``start`` that no link stands in front of; collect the links to folders."""
        stack = [start]
        while stack:
            folder = stack.pop()
            identity = _identity(folder)
            if identity in seen:  # reached in an earlier round, by a link into the middle of this tree
                self.left_out.add(AGAIN, folder)
                self._followed.discard(folder)
                continue
            seen.add(identity)
            if folder is not start:
                self._followed.add(folder)
            inner: list[str] = []
            for entry in _entries(folder):
                if _is_hidden(entry):
                    self.left_out.add(HIDDEN, entry.path)
                elif entry.is_symlink() and _is_folder(entry):
                    links.append(entry.path)
                elif _is_folder(entry):
                    inner.append(entry.path)
                elif not _is_file(entry):
                    self.left_out.add(DEAD if entry.is_symlink() else SPECIAL, entry.path)
                    self.dead.append(entry.path)
                elif entry.is_symlink():
                    self._links.append(entry.path)
            stack += reversed(inner)

    def drop_copies(self, wanted: Callable[[str], bool]) -> set[str]:
        """Leave out, and count, links to files that :meth:`files` gives under another name; their paths.

        A file counts where it really stands, or else behind the first of its links.

        Args:
            wanted: whether a path is read; others are no copies, and have none.
        """
        names: dict[tuple[int, int], list[str]] = {}
        for link in filter(wanted, self._links):
            names.setdefault(_identity(link), []).append(link)
        copies = {link for links in names.values() for link in links[1:]}
        inodes = {inode for _, inode in names}
        for entry in self._files("") if names else ():
            if entry.inode() in inodes and not entry.is_symlink() and wanted(entry.path):
                copies.update(names.get(_identity(entry.path), [])[:1])
        for link in sorted(copies):
            self.left_out.add(AGAIN, link)
        self._copies |= copies
        return copies

    def files(self, under: str = "") -> Iterator[str]:
        """Paths, folder by folder: a folder's files by name, then its folders by name.

        Args:
            under: the name of one of :meth:`folders`, to have its files alone.
        """
        return (entry.path for entry in self._files(under) if entry.path not in self._copies)

    def _files(self, under: str) -> Iterator[os.DirEntry[str]]:
        start = os.path.join(self.root, under) if under else self.root
        if under and start not in self._followed:
            return
        stack = [start]
        while stack:
            entries = [entry for entry in _entries(stack.pop()) if not _is_hidden(entry)]
            yield from (entry for entry in entries if not _is_folder(entry) and _is_file(entry))
            stack += reversed([entry.path for entry in entries if entry.path in self._followed])

    def folders(self) -> list[str]:
        """Names of the folders that stand in the root itself and are walked, sorted."""
        entries = _entries(self.root)
        return [entry.name for entry in entries if entry.path in self._followed]


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    """By its dot; Python's cache of compiled modules, too, which stands beside its sources."""
    return entry.name.startswith(".") or entry.name == "__pycache__"


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
