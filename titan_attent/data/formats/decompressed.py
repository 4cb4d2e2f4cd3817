"""Decompresses a file once, into a folder that the user names, so that its tokens can be read by position.

Cost: the decompressed copy on disk; memory of one block. It is bounded by the size that the index states.
"""

import os
from pathlib import Path

from titan_attent.data.formats.token_file import Hints, bad, file_size
from titan_attent.data.io.atomic import publish, temporary_name

CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}
"""Name in MDS -> name in pyarrow."""
_BLOCK = 2**20


def decompress(packed: Path, original: Path, compression: str, *, num_bytes: int, hints: Hints) -> Path:
    """The decompressed copy of ``packed``; it is kept if it has its size already.

    Args:
        original: where the file would be without compression; gives the copy its place below the folder.
        compression: a name in ``CODECS``.
        num_bytes: the size of the copy.

    Raises:
        ValueError: no folder was named, the compression is unknown, or the content has another size.
        OSError: the disk is full or fails.
    """
    if hints.decompressed is None:
        raise bad(
            packed,
            f"is compressed ({compression}), and tokens are read by position",
            "add --decompress DIR, which keeps a decompressed copy below DIR, or decompress it beside this one",
        )
    if compression not in CODECS:
        raise bad(
            packed, f"has the compression {compression[:40]!r}, which is not read", "decompress it beside this one"
        )
    assert hints.root is not None
    path = hints.decompressed / os.path.relpath(original, hints.root)
    if path.is_file() and file_size(path) == num_bytes:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    import pyarrow

    temporary, done = temporary_name(path), 0
    try:
        with open(packed, "rb") as raw, open(temporary, "wb") as file:
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), CODECS[compression])
            while done <= num_bytes and (block := stream.read(_BLOCK)):
                done += file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno is not None:  # of the disk
            raise
        raise bad(packed, f"cannot be decompressed ({error}): damaged") from None
    if done != num_bytes:
        temporary.unlink()
        raise bad(
            packed, f"decompresses to {'more' if done > num_bytes else 'fewer'} than its {num_bytes} bytes: damaged"
        )
    publish(temporary, path)
    return path
