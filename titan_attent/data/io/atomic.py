"""Atomic writes: a file is written under a temporary name, fsynced, and renamed."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``. After a crash the file is either the old or the new one, complete."""
    temporary = temporary_name(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def temporary_name(path: Path) -> Path:
    """The name of ``path`` while it is being written."""
    # In the same folder, because a rename is atomic only within a file system. The name is fixed, so that a new attempt
    # overwrites the file of a killed process.
    return path.with_name(path.name + ".tmp")


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete, fsynced file to its final name."""
    os.replace(temporary, path)
    # The new name is durable only after an fsync of the folder.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
