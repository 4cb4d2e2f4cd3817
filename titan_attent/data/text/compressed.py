"""Compressed inputs, .gz and .zst: their extensions, and reading them as streams of bytes.

pyarrow, which reads parquet anyway, decompresses .zst: files of several frames and skippable frames included. So no
further package is needed (Python itself has zstd from 3.14 on).

Cost: one block of the file in memory.
"""

import gzip
import io
import os
import zlib
from typing import IO, Any, cast

COMPRESSIONS = ("gz", "zst")
BLOCK = 2**17


class DamagedZstdError(Exception):
    """A .zst file that ends early, or is no such file."""


DAMAGE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, DamagedZstdError)
"""What reading a damaged file raises."""


def compression_of(extension: str) -> str:
    """``gz``, ``zst``, or "" for an extension such as ``json.gz``."""
    last = extension.rpartition(".")[2]
    return last if last in COMPRESSIONS else ""


def bare_extension(extension: str) -> str:
    """The extension without that of the compression: ``json`` for ``json.gz``."""
    return extension.removesuffix(f".{compression_of(extension)}")


def decompressed(raw: IO[bytes], *, compression: str) -> IO[bytes]:
    """The content of the open file ``raw``; closing it need not close ``raw``."""
    if compression == "gz":
        return cast(IO[bytes], gzip.open(raw))
    return io.BufferedReader(_Zstd(raw), BLOCK) if compression == "zst" else raw


class _Zstd(io.RawIOBase):
    """A decompressed file, which can be read forward only."""

    def __init__(self, raw: IO[bytes]):
        import pyarrow

        self._raw, self._position = raw, 0
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET and offset >= self._position
        while self._position < offset and (block := self._read(min(BLOCK, offset - self._position))):
            self._position += len(block)
        return self._position

    def readinto(self, buffer: Any) -> int:
        block = self._read(len(buffer))
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            if error.errno is not None:  # of the disk
                raise
            raise DamagedZstdError(str(error)) from None
