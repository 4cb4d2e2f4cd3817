"""Positioned reads from many files of a folder, of which few are open at a time.

Cost: a system call a read, and one open where the file is not among the ``limit`` used last. Nothing is mapped: a file
that shrinks or a disk that fails ends in an error that names the file, not in a signal, and neither the number of open
files nor the number of maps grows with the data set. Any number of threads may read at once.
"""

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

HASH_BLOCK = 8 * 2**20
"""Bytes read at a time when hashing: enough for full disk speed, little enough for many ranks."""


def open_file_limit() -> int:
    """Files that are kept open: a quarter of what the process may have (``ulimit -n``), 16 to 16,384."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 16_384 if soft == resource.RLIM_INFINITY else max(16, min(16_384, soft // 4))


class _OpenFile:
    """A descriptor that is closed when nobody holds it any more: not before a reader in another thread is done."""

    __slots__ = ("descriptor",)

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """Reads from the files of ``folder``, the ``limit`` used last kept open. Picklable: a copy opens its own.

    Args:
        folder: of all files.
        limit: by default :func:`open_file_limit`.
    """

    def __init__(self, folder: Path, *, limit: int | None = None):
        self.folder, self.limit = folder, limit or open_file_limit()
        # Paths are put together as strings: pathlib takes as long as the system does to open and close a file.
        self._prefix = os.path.join(folder, "")
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _remade, (self.folder, self.limit)

    def __len__(self) -> int:
        """Files open now."""
        return len(self._files)

    def read_into(self, buffer: memoryview, *, name: str, offset: int) -> None:
        """Fill ``buffer``, bytes, from byte ``offset`` of the file ``name`` on.

        Raises:
            ValueError: the file ends before.
            OSError: it is missing or cannot be read; names it.
        """
        file, done = self._get(name), 0
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

    def _get(self, name: str) -> _OpenFile:
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        file = _OpenFile(self._prefix + name)  # without the lock: on a network file system it takes its time
        with self._lock:
            # Two threads may both have opened it; one stays, and the other goes when its reader is done.
            self._files[name] = file
            while len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file


def _remade(folder: Path, limit: int) -> OpenFiles:
    return OpenFiles(folder, limit=limit)
