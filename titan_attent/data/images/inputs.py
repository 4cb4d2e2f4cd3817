"""Inputs of the image writer: what kind of thing each is, and folders with a folder of images a class."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from titan_attent.data.images.arrays import ArraysInput
from titan_attent.data.images.examples import Bad, Example, Input, Label, Limits
from titan_attent.data.images.tables import TableInput
from titan_attent.data.images.tars import TarInput

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_LIMITS = Limits()
_READERS: dict[str, Callable[..., Input]] = {
    ".parquet": TableInput,
    ".npz": ArraysInput,
    ".tar": TarInput,
    ".tar.gz": TarInput,
    ".tgz": TarInput,
}


def open_inputs(
    inputs: Sequence[tuple[str, Path]], *, keys: tuple[str, str] | None = None, limits: Limits = _LIMITS
) -> list[tuple[str, Input]]:
    """Source and input of each source and path; a folder of .parquet or tar files is as many, by name.

    Args:
        keys: names of what holds images and labels: columns, arrays, or (the second) a key of JSON in a tar file.
        limits: what is above them is not read into memory.

    Raises:
        ValueError: a path is missing or of unknown kind, or its file cannot be read.
    """
    opened: list[tuple[str, Input]] = []
    for source, path in inputs:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _kind(file) in (".parquet", ".tar", ".tar.gz", ".tgz"))
            opened += [(source, _READERS[_kind(file)](file, keys=keys, limits=limits)) for file in files]
            if not files:
                opened.append((source, FolderInput(path, limits=limits)))
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder; correct the path of this input")
        elif kind := _kind(path):
            opened.append((source, _READERS[kind](path, keys=keys, limits=limits)))
        else:
            raise ValueError(
                f"{path}: unsupported kind of file; give .parquet, .npz, .tar or .tar.gz files, or a folder that has a "
                "folder of images for each class"
            )
    return opened


def _kind(path: Path) -> str:
    """The extension of a kind of file that is read, "" of others and of hidden ones."""
    if path.name.startswith("."):
        return ""
    return next((extension for extension in _READERS if path.name.lower().endswith(extension)), "")


class FolderInput:
    """A folder that has a folder of images, or of folders of them, for each class; hidden ones are left out.

    Files of another extension than ``IMAGE_EXTENSIONS`` are left out, too.

    Raises:
        ValueError: it has no folder.
    """

    holds_files = True
    ordered = False

    def __init__(self, path: Path, *, limits: Limits):
        self.path, self.limits = path, limits
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise ValueError(f"{path}: has no folder in it; give a folder that has a folder of images for each class")
        self.names = [name for name in folders if next(_list_images(path / name), None)]
        self._empty = [name for name in folders if name not in set(self.names)]
        self._stray = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and _is_image(entry.name))

    def labels(self) -> Iterator[Label]:
        return iter(self.names)

    def examples(self) -> Iterator[Example | Bad]:
        for name in self._empty:
            held = next((file for file in sorted((self.path / name).rglob("*")) if _kind(file)), None)
            mend = f"give {held.parent} as the input" if held else "fill or remove it"
            problem = f"this class folder has no image ({', '.join(IMAGE_EXTENSIONS)})"
            yield Bad(str(self.path / name), "class", problem, mend)
        for name in self._stray:
            yield Bad(str(self.path / name), "label", "an image outside of the class folders", "move or remove it")
        for name in self.names:
            for path in _list_images(self.path / name):
                yield self._example(path, name)

    def _example(self, path: str, name: str) -> Example | Bad:
        try:
            if (num_bytes := os.stat(path).st_size) > self.limits.file_bytes:
                problem = f"has {num_bytes:,} bytes, more than the {self.limits.file_bytes:,} that may be"
                return Bad(path, "large", problem, "remove it, or raise --max-file-bytes")
            return Example(path, Path(path).read_bytes(), name)
        except OSError as error:
            return Bad(path, "undecodable", f"cannot be read ({error.strerror or error})", "mend or remove it")


def _list_images(folder: Path) -> Iterator[str]:
    """Paths of the images in it, folder by folder, each sorted by name."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if _is_image(name))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
