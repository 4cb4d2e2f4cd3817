"""Whether another process holds a lock file; titan/owner.py takes the locks of a run.

Cost: one open and two system calls.
"""

import errno
import fcntl
import os
from pathlib import Path

LOCK_FILE = "run.lock"
HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def in_use(path: Path, key: str, *, holder: str) -> ValueError:
    """The error for a folder whose lock file ``path`` another run holds; ``key`` names the folder in the message."""
    return ValueError(
        f"{key} = {path.parent}: another run is using this folder ({holder or 'its process is unknown'}), and "
        "the two would overwrite each other's checkpoints and logs. Wait until it ends, or name another folder"
    )


def read_holder(handle: int) -> str:
    """What the holder of an open lock file wrote about itself."""
    return os.pread(handle, 200, 0).decode("utf-8", "replace").strip()


def check_free(path: Path, key: str) -> None:
    """Raise :func:`in_use` if another process holds the lock file ``path``. Takes no lock and creates no file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed, below
    except OSError as error:
        if error.errno in HELD_ELSEWHERE:
            raise in_use(path, key, holder=read_holder(handle)) from None
    finally:
        os.close(handle)
