"""Shards whose tokens are in files of other tools, read in place: where they are, and whether a file has changed.

A shard is a view of a file: some of its tokens, whole documents. They are contiguous from a byte on, or in segments
with other bytes between them. The table of the segments is a file beside index.json:

    adopted-00000.segments   uint64 little-endian [num_segments, 2]: the first token of each, from the start of the
                             shard, rising from 0, and its byte in the file

Cost: about 300 bytes of index per view; one stat per view when a run starts. Segments take 16 bytes per segment on
disk; the tables of the shards used last are kept in memory, ``MAX_TABLE_BYTES`` at most, so a read takes one more read
of a table if its shard was not used lately.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from titan_attent.data.io.files import OpenFiles

SEGMENT_DTYPE = np.dtype("<u8")
MAX_SEGMENTS = 2**24
"""Segments of a shard: a table of 256 MiB."""
MAX_TABLE_BYTES = 2**28
"""Bytes of the tables that are kept in memory, beyond the last one."""
ADOPT = "python -m titan_attent.data.adopt"
FIX = f"adopt the files again with the same `{ADOPT}` command, which hashes what has changed"


@dataclass(frozen=True)
class FileView:
    """Where the tokens of a shard are.

    Attributes:
        path: the file, relative to the root of the data set.
        offset: the byte of the first token.
        num_bytes: bytes from there to the end of the last token; these are hashed.
        first_token: number of the file's tokens that come before.
        file_bytes, mtime_ns: size and time of the file when it was adopted.
        num_segments: 0 if the tokens are contiguous.
        segments_sha256: sha256 (hex) of the table of segments; empty if there is none.
    """

    path: str
    offset: int
    num_bytes: int
    first_token: int
    file_bytes: int
    mtime_ns: int
    num_segments: int = 0
    segments_sha256: str = ""

    def check(self, num_tokens: int, itemsize: int) -> None:
        """ValueError if this, read from an index, cannot hold ``num_tokens``, or is not below the root."""
        path = PurePosixPath(self.path)
        if not self.path or path.is_absolute() or ".." in path.parts or "\0" in self.path:
            raise ValueError(f"path {self.path!r} is not the path of a file below the root")
        if min(self.offset, self.num_bytes, self.first_token, self.num_segments) < 0:
            raise ValueError(f"{self.path!r} has a negative offset or count")
        if self.offset + self.num_bytes > self.file_bytes or self.num_bytes < num_tokens * itemsize:
            raise ValueError(f"{self.path!r} has {self.file_bytes} bytes, too few for its tokens")
        if bool(self.num_segments) != bool(self.segments_sha256) or self.num_segments > min(MAX_SEGMENTS, num_tokens):
            raise ValueError(f"{self.path!r} has {self.num_segments} segments of {num_tokens} tokens")
        if not self.num_segments and self.num_bytes != num_tokens * itemsize:
            raise ValueError(f"{self.path!r} has other bytes than its tokens")

    def check_unchanged(self, root: Path) -> None:
        """ValueError if the file is missing, or has another size or time than when it was adopted. One stat."""
        path = root / self.path
        try:
            found = path.stat()
        except FileNotFoundError:
            raise ValueError(
                f'{path}: this adopted file is missing; restore it, or, if the files were moved, set "root" in '
                "index.json to their folder"
            ) from None
        if (found.st_size, found.st_mtime_ns) != (self.file_bytes, self.mtime_ns):
            what = f"has {found.st_size} bytes" if found.st_size != self.file_bytes else "has another time of change"
            raise ValueError(
                f"{path}: {what} than when it was adopted ({self.file_bytes} bytes): it was changed or copied; {FIX}"
            )


def segments_file(shard_file: str) -> str:
    """The name of the file with the segments of a shard."""
    return shard_file.removesuffix(".bin") + ".segments"


class SegmentTables:
    """Finds the bytes of tokens that are in segments. Any number of threads may ask. Picklable.

    Args:
        files: the files of the data set's folder.
        itemsize: bytes per token.
    """

    def __init__(self, files: OpenFiles, *, itemsize: int):
        self.files, self.itemsize = files, itemsize
        self._tables: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _new_tables, (self.files, self.itemsize)

    def parts(self, file: str, view: FileView, num_tokens: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (byte in the file, number of tokens) of each part of the tokens [start, stop) of a shard.

        Args:
            file, view, num_tokens: of the shard.

        Raises:
            ValueError: the table of the shard is damaged.
        """
        if not view.num_segments:
            yield view.offset + start * self.itemsize, stop - start
            return
        starts, offsets = self._table(file, view, num_tokens)
        number = bisect_right(starts, start) - 1
        while start < stop:
            first = int(starts[number])
            end = int(starts[number + 1]) if number + 1 < len(starts) else num_tokens
            yield int(offsets[number]) + (start - first) * self.itemsize, min(stop, end) - start
            start, number = min(stop, end), number + 1

    def _table(self, file: str, view: FileView, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if file in self._tables:
                self._tables.move_to_end(file)
                return self._tables[file]
        table = np.empty((view.num_segments, 2), dtype=SEGMENT_DTYPE)
        name = segments_file(file)
        self.files.read_into(table.reshape(-1).view(np.uint8).data, name=name, offset=0)
        starts, offsets = np.ascontiguousarray(table.T)
        lengths = np.diff(starts, append=np.uint64(num_tokens))
        rises = starts[0] == 0 and np.all(starts[1:] > starts[:-1]) and starts[-1] < num_tokens
        last = view.file_bytes - lengths * np.uint64(self.itemsize) if rises else lengths
        if not rises or np.any(offsets > last):
            raise ValueError(f"{self.files.folder / name}: its segments do not lie in {view.path}: damaged; {FIX}")
        with self._lock:
            if file not in self._tables:
                self._tables[file] = starts, offsets
                self._num_bytes += table.nbytes
            while self._num_bytes > MAX_TABLE_BYTES and len(self._tables) > 1:
                _, (dropped, _) = self._tables.popitem(last=False)
                self._num_bytes -= 2 * dropped.nbytes
        return starts, offsets


def _new_tables(files: OpenFiles, itemsize: int) -> SegmentTables:
    return SegmentTables(files, itemsize=itemsize)
