"""Files of a checkpoint, in a local folder or, through fsspec, at a remote path such as ``s3://bucket/step-1000``.

Remote paths are those that torch.distributed.checkpoint takes: it passes a path with ``://`` to fsspec. The package of
its protocol (s3fs, gcsfs) must be installed.
"""

import io
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemReader

from titan_attent.edit.uncached import NewFile

REMOTE = "://"


def is_remote(path: str) -> bool:
    """Whether fsspec opens the path."""
    return REMOTE in path


class Folder:
    """The files of the folder ``path``. Picklable.

    Raises:
        ValueError: fsspec has no such protocol, or lacks the package for it.
    """

    def __init__(self, path: str):
        self.path = path
        self._fs = _file_system(path)

    def __reduce__(self) -> Any:
        return Folder, (self.path,)

    def open(self, name: str, mode: str = "rb") -> AbstractContextManager[io.IOBase]:
        """A stream of the file ``name``; OSError if it cannot be opened."""
        return self._fs.create_stream(self.join(name), mode)

    def create(self, name: str) -> AbstractContextManager[io.IOBase]:
        """A stream to the new file ``name``, for large ones; OSError if it cannot be made."""
        return self.open(name, "wb") if is_remote(self.path) else NewFile(self.join(name))

    def read(self, name: str) -> bytes:
        """The bytes of the file ``name``."""
        with self.open(name) as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Write the file ``name``, and wait until it is on the disk."""
        with self.open(name, "wb") as stream:
            stream.write(content)
            sync(stream)

    def has(self, name: str) -> bool:
        """Whether the file ``name`` exists."""
        return self._fs.exists(self.join(name))

    def size(self, name: str) -> int:
        """The number of bytes of the file ``name``; OSError if there is none."""
        if not is_remote(self.path):
            return os.stat(self.join(name)).st_size
        with self.open(name) as stream:
            return stream.seek(0, os.SEEK_END)

    def make(self) -> None:
        """Create the folder."""
        self._fs.mkdir(self.path)

    def remove(self, name: str) -> None:
        """Delete the file ``name``."""
        self._fs.rm_file(self.join(name))

    def join(self, name: str) -> str:
        return os.path.join(self.path, name)


def _file_system(path: str) -> Any:
    if not is_remote(path):
        return FileSystemReader(Path(path)).fs
    try:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return cast(Any, FsspecReader)(path).fs
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: fsspec cannot open it ({error}). Install the package of its protocol") from None


def sync(stream: io.IOBase) -> None:
    """Write the stream's buffers to the disk, where it is a local file."""
    stream.flush()
    if getattr(stream, "fileno", None) is None:
        return
    try:
        descriptor = stream.fileno()
    except (OSError, io.UnsupportedOperation):
        return  # a remote stream: closing it completes the upload
    os.fsync(descriptor)


class Slice(io.RawIOBase):
    """The bytes [start, start + length) of a seekable stream, as a stream."""

    def __init__(self, stream: io.IOBase, start: int, length: int):
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise ValueError("a negative position in a stream")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(self._length - self._at, 0)]
        if not view:
            return 0
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count
