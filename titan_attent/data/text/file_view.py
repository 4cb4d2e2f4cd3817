"""Shards whose tokens are in files of other tools, read in place: where they are, and whether a file has changed.

A shard is a view of a file: some of its tokens, whole documents. They are contiguous from a byte on, or in segments
with other bytes between them. The table of the segments is a file beside index.json:

    adopted-00000.segments   uint64 little-endian [num_segments, 2]: the first token of each, from the start of the
                             shard, rising from 0, and its byte in the file

segments.py reads them. Cost: about 300 bytes of index per view; one stat per view when a run starts. Segments take 16
bytes per segment on disk.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

SEGMENT_DTYPE = np.dtype("<u8")
MAX_SEGMENTS = 2**24
"""Segments of a shard: a table of 256 MiB."""
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
