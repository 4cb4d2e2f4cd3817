"""One run at a time in a folder: a lock that ends with the process that holds it.

Two runs in one ``job.dump_folder`` would overwrite each other's checkpoints and logs. Rank 0 alone takes the lock, so
that a run on many nodes that share the folder is one run, and all ranks end alike where it is taken. It is an flock on
a file, which the system gives back when the process ends, killed or not: nothing is left that a resume has to remove.
What the file holds says who has it, and means nothing without the lock. A checkpoint folder outside the dump folder has
a lock of its own, beside it.

A network file system may keep no locks, or those of each node apart (Lustre's ``localflock``). Where it says so there
is a warning, and it is the user who starts one run.

Cost: one small file; one broadcast at the start.
"""

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from titan_attent.titan.user_errors import fail, on_first_rank

LOCK_FILE = "run.lock"
_HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

_held: dict[tuple[int, int], int] = {}
"""(device, inode) of a lock file -> its descriptor, of those that this process holds; it may take one twice."""


def own_folders(job_config: JobConfig) -> None:
    """Take the folders that a run writes; ends all ranks where another run has one. A collective, on all ranks."""

    def take() -> None:
        for path, key in _lock_files(job_config).items():
            own(path, key)

    try:
        on_first_rank(take)
    except ValueError as error:
        fail(error)


def release_folders(job_config: JobConfig) -> None:
    """Give back what :func:`own_folders` took, where this process has it."""
    for path in _lock_files(job_config):
        if path.exists() and (handle := _held.pop(_key(os.stat(path)), None)) is not None:
            os.close(handle)


def _lock_files(job_config: JobConfig) -> dict[Path, str]:
    """Lock file -> the key of the folder that it stands for."""
    dump, checkpoint = Path(job_config.job.dump_folder), job_config.checkpoint
    files, key = {dump / LOCK_FILE: "[job] dump_folder"}, "[checkpoint] folder"
    if not checkpoint.enable:
        return files
    folder = (dump / checkpoint.folder).resolve()  # runs may reach one folder by links of their own
    is_outside = not folder.is_relative_to(dump.resolve())
    # Beside it: whether the folder exists decides what torchtitan loads.
    if is_outside or _beside(folder).exists():
        files[_beside(folder)] = key
    if is_outside:  # but in the dump folder of another run, perhaps
        others = (place / LOCK_FILE for place in (folder, *folder.parents))
        if (other := next((file for file in others if file.is_file()), None)) is not None:
            files[other] = key
    return files


def _beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.{LOCK_FILE}"


def own(path: Path, key: str) -> None:
    """Hold the lock file ``path`` until this process ends; ValueError if another process does.

    ``key`` names what it stands for in the message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open(path)
    except OSError:
        return  # Where no file can be made, this run overwrites none; what it needs to write there says so itself.
    if (place := _key(os.fstat(handle))) in _held:
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
        os.close(handle)
        if error.errno in _HELD_ELSEWHERE:
            raise ValueError(
                f"{key} = {path.parent}: another run is at work there ({holder or 'it does not say which'}), and the "
                "two would overwrite each other's checkpoints and logs. Wait for its end, or name another folder"
            ) from None
        logger.warning(
            f"{key} = {path.parent}: its file system keeps no locks ({error}): nothing keeps a second run out. Start "
            "one only"
        )
        return
    _held[place] = handle
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # another user's file, or a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's, in a folder that both write


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _forget() -> None:
    """In a forked child: the lock is its parent's, and must end with it."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
