"""The folder of a data set: the names in it, and a lock that keeps a second writer out."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX_FILE = "index.json"
PROGRESS_FILE = "progress.json"
"""What writer.py keeps until the index is written; alone, it means an interrupted writer."""
DEFAULT_SOURCE = "default"
"""The source of what was given no name."""


def is_source_name(name: str) -> bool:
    """Letters, digits, ``_``, ``.`` and ``-``: what may be part of a TensorBoard tag."""
    return re.fullmatch("[A-Za-z0-9_.-]+", name) is not None


def check_file_name(name: object, *, of: str) -> None:
    """ValueError if ``name``, found in a data set, is more than a name: nothing outside of its folder is read."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError(f"{of} {name!r} is not the name of a file in the folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second writer out of ``folder``, such as one started by every rank of a job."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"{folder}: another writer is at work there; wait for it, or choose another --output"
        ) from error
    except OSError:
        pass  # Some network file systems lock no folders; there it is the user who starts one writer.
    try:
        yield
    finally:
        os.close(handle)
