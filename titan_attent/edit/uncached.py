"""Local files without the page cache: an edit reads and writes every byte once, in order, and needs none of them again.

What is left in the cache costs twice: it pushes out what others read again, and every page of it is a new one, which a
virtual machine first has to get from its host. So new files are written directly (O_DIRECT) where the file system can,
in blocks, and files that are read are dropped from the cache as the edit goes on. Both change the speed only.

Cost: memory of two blocks per file that is written, and a copy of its bytes into them.
"""

import contextlib
import fcntl
import io
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

BLOCK = 2**23
"""Bytes per write; a multiple of what O_DIRECT needs, the block size of the disk."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # of Linux


class NewFile(io.RawIOBase):
    """A new file at ``path``, written past the page cache; OSError as of ``open``. It is complete when it is closed."""

    def __init__(self, path: str):
        self._descriptor = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError:  # a file system without it
            self._descriptor = os.open(path, flags, 0o666)
        # Mapped, because O_DIRECT needs memory that begins a page. One is filled while the other is written.
        self._block, self._other, self._filled = mmap.mmap(-1, BLOCK), mmap.mmap(-1, BLOCK), 0
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            count = min(len(view), BLOCK - self._filled)
            self._block[self._filled : self._filled + count] = view[:count]
            self._filled, view = self._filled + count, view[count:]
            if self._filled == BLOCK:
                self._write_block()
        return size

    def close(self) -> None:
        if self._descriptor < 0:
            return
        try:
            self._wait()
            if self._filled and _DIRECT:  # the last block has any length
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._write(self._block, self._filled)
        finally:
            self._thread.shutdown()
            os.close(self._descriptor)
            self._descriptor = -1
            super().close()

    def _write_block(self) -> None:
        self._wait()
        self._written = self._thread.submit(self._write, self._block, self._filled)
        self._block, self._other, self._filled = self._other, self._block, 0

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def _write(self, block: mmap.mmap, size: int) -> None:
        with memoryview(block) as whole:
            rest = whole[:size]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


def forget(stream: Any) -> None:
    """Drop what was read of a file from the system's cache; nothing for a remote one, or where this does not exist."""
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
