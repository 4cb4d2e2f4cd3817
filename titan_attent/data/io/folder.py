"""The folder of a data set: its file names, and a lock that excludes a second writer."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX_FILE = "index.json"
PROGRESS_FILE = "progress.json"
"""State of the writer, deleted once the index is written. Without an index it means an interrupted writer."""
DEFAULT_SOURCE = "default"
"""The source of inputs without a name."""


def is_source_name(name: str) -> bool:
    """Whether ``name`` has only letters, digits, ``_``, ``.`` and ``-``, as part of a TensorBoard tag must."""
    return re.fullmatch("[A-Za-z0-9_.-]+", name) is not None


def check_file_name(name: object, *, of: str) -> None:
    """ValueError unless ``name``, read from a data set, is a bare file name, so that reads stay inside the folder."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError(f"{of} {name!r} is not the name of a file in the folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude a second writer of ``folder``, such as one started by every rank of a job."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"{folder}: another writer is writing to this folder; wait for it, or choose another --output"
        ) from error
    except OSError:
        pass  # Some network file systems cannot lock folders; then the user must start only one writer.
    try:
        yield
    finally:
        os.close(handle)
