"""Locks the folders of a run, so that only one run at a time writes to them.

Two runs in one ``job.dump_folder`` would overwrite each other's checkpoints and logs. Only rank 0 takes the lock, so
one run may use many nodes that share the folder. If the folder is locked by another run, all ranks end. The lock is an
flock on a file. The operating system releases it when the process ends, also when it is killed, so a resume has nothing
to remove. The text in the file names the holder; without the lock it has no meaning. A checkpoint folder outside the
dump folder has its own lock file next to it.

A network file system may support no locks, or only locks within a node (Lustre's ``localflock``). If it reports that it
supports none, there is a warning, and the user must not start a second run.

Cost: one small file; one broadcast at the start.
"""

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from titan_attent.foundations.file_lock import HELD_ELSEWHERE, LOCK_FILE, in_use, read_holder
from titan_attent.titan.user_errors import fail, on_first_rank

_held: dict[tuple[int, int], int] = {}
"""(device, inode) of each lock file that this process holds -> its descriptor; taking a lock twice is allowed."""


def own_folders(job_config: JobConfig) -> None:
    """Lock the folders that a run writes; ends all ranks if another run holds one of them. A collective."""

    def take() -> None:
        for path, key in _lock_files(job_config).items():
            own(path, key)

    try:
        on_first_rank(take)
    except ValueError as error:
        fail(error)


def release_folders(job_config: JobConfig) -> None:
    """Release the locks of :func:`own_folders` that this process holds."""
    for path in _lock_files(job_config):
        if path.exists() and (handle := _held.pop(_key(os.stat(path)), None)) is not None:
            os.close(handle)


def _lock_files(job_config: JobConfig) -> dict[Path, str]:
    """Each lock file of the run -> the TOML key of the folder that it locks, for messages."""
    dump, checkpoint = Path(job_config.job.dump_folder), job_config.checkpoint
    files, key = {dump / LOCK_FILE: "[job] dump_folder"}, "[checkpoint] folder"
    if not checkpoint.enable:
        return files
    folder = (dump / checkpoint.folder).resolve()  # different runs may reach one folder through different links
    is_outside = not folder.is_relative_to(dump.resolve())
    # The lock file is next to the folder, not in it: torchtitan loads a checkpoint if the folder exists.
    if is_outside or _beside(folder).exists():
        files[_beside(folder)] = key
    if is_outside:  # it may be inside the dump folder of another run
        candidates = (parent / LOCK_FILE for parent in (folder, *folder.parents))
        if (existing := next((file for file in candidates if file.is_file()), None)) is not None:
            files[existing] = key
    return files


def _beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.{LOCK_FILE}"


def own(path: Path, key: str) -> None:
    """Hold the lock file ``path`` until this process ends; ValueError if another process does.

    ``key`` names the folder in the message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open(path)
    except OSError:
        return  # If no file can be created here, this run overwrites none; a later write raises its own error.
    if (lock := _key(os.fstat(handle))) in _held:
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = read_holder(handle)
        os.close(handle)
        if error.errno in HELD_ELSEWHERE:
            raise in_use(path, key, holder=holder) from None
        logger.warning(
            f"{key} = {path.parent}: its file system supports no locks ({error}), so a second run in this folder "
            "would not be refused. Do not start one"
        )
        return
    _held[lock] = handle
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a file of another user, or a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a file of another user, in a folder that both can write


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _forget() -> None:
    """Close the lock files in a forked child: the lock must end with the parent process."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
