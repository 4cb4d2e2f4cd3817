"""Positioned reads from many files of a folder, with few of them open at a time.

Cost: one system call per read, and one open if the file is not among the ``limit`` most recently used. Files are not
memory-mapped: if a file shrinks or a disk fails, the error names the file, where a mapping would raise a signal. Nor
does the number of open files or maps grow with the data set. Any number of threads may read at once.
"""

import hashlib
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

HASH_BLOCK = 8 * 2**20
"""Bytes per read when hashing: large enough for full disk speed, small enough for many ranks."""
_RECENT = 16
"""Files that one thread keeps open at most, beyond the limit, until it has read its parts."""


def open_file_limit() -> int:
    """Number of files kept open: a quarter of the process limit (``ulimit -n``), 16 to 16,384."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 16_384 if soft == resource.RLIM_INFINITY else max(16, min(16_384, soft // 4))


def hash_file(
    path: Path, *, offset: int = 0, num_bytes: int | None = None, read: Callable[[int], object] = lambda size: None
) -> str:
    """sha256 (hex) of the bytes of a file from ``offset`` on, at about 1 GB/s.

    Args:
        num_bytes: number of bytes; None for all. A shorter file gives the hash of what it has.
        read: called with the number of bytes of every block, for a progress bar.
    """
    sha256, missing = hashlib.sha256(), num_bytes
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(HASH_BLOCK if missing is None else min(HASH_BLOCK, missing)):
            sha256.update(block)
            missing = None if missing is None else missing - len(block)
            read(len(block))
    return sha256.hexdigest()


class OpenFile:
    """A descriptor that is closed with its last reference, so not while another thread still reads from it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """Reads from the files of ``folder``; the ``limit`` most recently used stay open. Picklable: a copy reopens them.

    Args:
        folder: the folder of all files.
        limit: maximum number of open files; by default :func:`open_file_limit`.
    """

    def __init__(self, folder: Path, *, limit: int | None = None):
        self.folder, self.limit = folder, limit or open_file_limit()
        # Paths are joined as strings: pathlib takes as long as opening and closing a file.
        self._prefix = os.path.join(folder, "")
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _reopen, (self.folder, self.limit)

    def __len__(self) -> int:
        """Number of files that are open now."""
        return len(self._files)

    def read_into(self, buffer: memoryview, *, name: str, offset: int) -> None:
        """Fill ``buffer`` with the bytes of the file ``name`` from ``offset`` on.

        Raises:
            ValueError: the file ends too early.
            OSError: the file is missing or cannot be read; the error names it.
        """
        file, done = self.open(name), 0
        while done < len(buffer):
            try:
                count = os.preadv(file.descriptor, [buffer[done:] if done else buffer], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._prefix + name) from None
            if count == 0:
                raise ValueError(
                    f"{self._prefix}{name}: ends at byte {offset + done}, before byte {offset + len(buffer)} that is "
                    "to be read: it was truncated or replaced; copy the data set again"
                )
            done += count

    def read_parts(self, numbers: np.ndarray, parts: Iterable[tuple[str, int, int, int]]) -> list[int]:
        """Fill ``numbers[first:stop]`` for each part (name, offset in bytes, first, stop), one after the other.

        Faster than :meth:`read_into` for many parts: the files of the last parts are at hand.

        Returns:
            The last number of each part, as read, since a later part may overwrite it.

        Raises:
            ValueError, OSError: as :meth:`read_into`.
        """
        size, values, last = numbers.itemsize, numbers.data, list[int]()
        append, preadv = last.append, os.preadv
        buffer = numbers.view(np.uint8).data
        recent: dict[str, OpenFile] = {}
        for name, offset, first, stop in parts:
            file = recent.get(name)
            if file is None:
                if len(recent) == _RECENT:
                    recent.clear()
                file = recent[name] = self.open(name)
            part = buffer[first * size : stop * size]
            try:
                count = preadv(file.descriptor, (part,), offset)
            except OSError:
                count = -1
            if count != len(part):
                self.read_into(part, name=name, offset=offset)  # reads again, and names the file in its errors
            append(values[stop - 1])
        return last

    def read_scattered(
        self, file: OpenFile, name: str, buffers: Sequence[memoryview], offset: int, num_bytes: int
    ) -> None:
        """Fill ``buffers``, one behind the other, with the bytes of ``file`` from ``offset`` on, in one call.

        Args:
            file, name: from :meth:`open`.
            buffers: 1,024 at most, of ``num_bytes`` in all.

        Raises:
            ValueError, OSError: as :meth:`read_into`.
        """
        try:
            count = os.preadv(file.descriptor, buffers, offset)
        except OSError:
            count = -1
        if count != num_bytes:
            for buffer in buffers:  # reads again, and names the file in its errors
                self.read_into(buffer, name=name, offset=offset)
                offset += len(buffer)

    def open(self, name: str) -> OpenFile:
        """The file ``name``, which stays open as long as the returned object is kept. OSError if that fails."""
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        file = OpenFile(self._prefix + name)  # outside the lock: it may be slow on a network file system
        with self._lock:
            # If two threads opened the same file, one descriptor stays; the other closes when its reader is done.
            self._files[name] = file
            while len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file


def _reopen(folder: Path, limit: int) -> OpenFiles:
    return OpenFiles(folder, limit=limit)
