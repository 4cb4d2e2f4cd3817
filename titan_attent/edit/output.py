"""The folder of the result: it appears under its name when it is complete, verified and on the disk, and not before.

A local result is written in a folder ``.edit-<hash>.tmp`` beside it, whose name no tool takes for a step's; the same
edit overwrites what a killed one left there. At a remote path, where a folder cannot be renamed, ``.metadata`` is
written last: without it the files are no checkpoint.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_attent.data.io.atomic import publish
from titan_attent.data.io.folder import locked
from titan_attent.edit.storage import Folder, is_remote
from titan_attent.titan.checkpoint_metadata import METADATA_FILE


def check_output(path: str, *, num_bytes: int) -> None:
    """Refuse a path that exists, cannot be made, or lacks room for ``num_bytes``; ValueError. Writes nothing."""
    if is_remote(path):
        if Folder(path).has(METADATA_FILE):
            raise ValueError(f"--output {path}: holds a checkpoint; choose another --output")
        return
    folder = Path(path).absolute()
    if os.path.lexists(folder) and not _is_empty(folder):
        raise ValueError(f"--output {path}: exists; choose another --output, or delete it first")
    parent = next(above for above in folder.parents if above.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output {path}: cannot be written, because {parent} is no writable folder")
    if (free := shutil.disk_usage(parent).free) < num_bytes:
        room = f"{parent} has {free / 1e9:,.1f} GB free"
        raise ValueError(f"--output {path}: the result has {num_bytes / 1e9:,.1f} GB, and {room}")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and next(folder.iterdir(), None) is None


@contextmanager
def new_folder(path: str) -> Iterator[Folder]:
    """A folder for the files of the result; it gets the name ``path`` when the block ends without an error.

    Raises:
        ValueError: another edit writes the same result.
    """
    if is_remote(path):
        folder = Folder(path)
        folder.make()
        yield folder
        return
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(target)
    temporary.mkdir(exist_ok=True)
    with locked(temporary):
        try:
            for left in temporary.iterdir():
                left.unlink()
            yield Folder(str(temporary))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(temporary)
        publish(temporary, target)


def temporary_folder(target: Path) -> Path:
    """Where the result ``target`` is written; without "step-", by which torchtitan finds checkpoints."""
    return target.with_name(f".edit-{hashlib.sha256(target.name.encode()).hexdigest()[:12]}.tmp")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
