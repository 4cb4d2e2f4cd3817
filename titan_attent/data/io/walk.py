"""Files of a folder in a fixed order, each real folder once; and counts of the entries that are not read.

Symbolic links to folders are followed. A folder with several paths is read once: under its real path if that is inside
the walked folder, else under the first link to it. So a link to a parent, a sibling or itself gives no copy, and a link
to a folder that contains the root gives nothing. Files are read once, too, after ``drop_copies``. Hidden entries, dead
links and entries that are not regular files are left out and counted.

Cost: every folder is listed twice, the first time to find which links to follow, and a third time if links lead to
files; memory for folders and links, but not for files.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HIDDEN, AGAIN, DEAD, SPECIAL = "hidden", "linked twice", "dead link", "not a file"
"""Reasons: name with a leading dot, or a cache; read under another path; dead link; pipe, socket or device."""
UNCOUNTED = (HIDDEN, AGAIN)
"""Reasons that lose no data: they do not count toward the refusal of an input with more left out than read."""


class LeftOut:
    """Counts the entries of an input that are not read, by reason, with the first entry of each reason.

    Attributes:
        extensions: reason -> number of files per extension, for the reasons that count them.
        harmless: reasons that lose no data.
        notes: further notes on the input for the report.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.extensions: dict[str, Counter[str]] = {}
        self.harmless = set(UNCOUNTED)
        self.notes: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.counts or self.notes)

    def add(self, reason: str, where: str | os.PathLike[str], count: int = 1) -> None:
        self.counts[reason] += count
        self.first.setdefault(reason, os.fspath(where))

    def add_file(self, reason: str, where: str | os.PathLike[str], *, extension: str) -> None:
        """Count a file, and its extension."""
        self.add(reason, where)
        self.extensions.setdefault(reason, Counter())[extension] += 1

    def update(self, other: "LeftOut") -> None:
        self.counts.update(other.counts)
        for reason, counts in other.extensions.items():
            self.extensions.setdefault(reason, Counter()).update(counts)
        self.first = {**other.first, **self.first}
        self.harmless |= other.harmless
        self.notes += other.notes

    @property
    def num_counted(self) -> int:
        """Number of entries left out for other than the harmless reasons."""
        return sum(count for reason, count in self.counts.items() if reason not in self.harmless)

    def summary(self) -> str:
        """``left out 12 hidden (first: a/.git), 3 dead link (first: a/b)``, then the notes; "" if there are none.

        Several files whose extensions were counted have these, too: ``(first: a/b.csv; 3 .csv, 1 .pdf)``.
        """
        parts = []
        for reason, count in sorted(self.counts.items()):
            extensions = f"; {by_count(self.extensions[reason])}" if count > 1 and reason in self.extensions else ""
            parts.append(f"{count:,} {reason} (first: {self.first[reason]}{extensions})")
        return "; ".join((["left out " + ", ".join(parts)] if parts else []) + self.notes)


def by_count(counts: Counter[str]) -> str:
    """``12 .jsonl, 3 .md``: the largest count first."""
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


class FolderWalk:
    """The files below ``root``, without hidden ones.

    Attributes:
        left_out: the entries that the walk itself leaves out, for the reasons above.
        dead: the paths among them that are dead links or not regular files.

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
        # In rounds: the real content of a round's folders comes before the targets of their links.
        # Folders that contain the root count as seen, so no link to them is followed.
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
        """Walk the real folders below ``start``, record and count their entries, and collect links to folders."""
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

    def drop_copies(self, is_read: Callable[[str], bool]) -> set[str]:
        """Leave out, and count, links to files that :meth:`files` yields under another path. Returns their paths.

        A file is kept under its real path if that is read, else under the first link to it.

        Args:
            is_read: whether a path is read. Other paths are ignored.
        """
        names: dict[tuple[int, int], list[str]] = {}
        for link in filter(is_read, self._links):
            names.setdefault(_identity(link), []).append(link)
        copies = {link for links in names.values() for link in links[1:]}
        inodes = {inode for _, inode in names}
        for entry in self._files("") if names else ():
            if entry.inode() in inodes and not entry.is_symlink() and is_read(entry.path):
                copies.update(names.get(_identity(entry.path), [])[:1])
        for link in sorted(copies):
            self.left_out.add(AGAIN, link)
        self._copies |= copies
        return copies

    def files(self, under: str = "") -> Iterator[str]:
        """Yield the paths, folder by folder: first the files of a folder by name, then its folders by name.

        Args:
            under: the name of one of :meth:`folders`, for its files only.
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
        """Sorted names of the folders directly in the root that are walked."""
        entries = _entries(self.root)
        return [entry.name for entry in entries if entry.path in self._followed]


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    """Whether the name has a leading dot, or is Python's cache of compiled modules."""
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
