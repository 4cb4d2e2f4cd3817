"""Files that are whole under their name, or not there: written under a temporary one, brought to disk, renamed."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: after a crash the file is the old or the new one, whole."""
    temporary = temporary_name(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def temporary_name(path: Path) -> Path:
    """What ``path`` is called until it is whole."""
    # In the same folder, where a rename is atomic; a fixed name, so that what a killed process left
    # behind is overwritten and not piled up.
    return path.with_name(path.name + ".tmp")


def publish(temporary: Path, path: Path) -> None:
    """Give a file that is whole, and on disk, its name."""
    os.replace(temporary, path)
    # The name is durable only when its folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
