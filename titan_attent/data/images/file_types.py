"""File types by name: images that are read, archives of images, and sidecar files (captions, lists, notes)."""

import os

ARCHIVES = (".parquet", ".npz", ".tar", ".tar.gz", ".tgz")
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"),
    *("jpe", "jfif", "jif", "pjpeg", "apng", "pbm", "pnm"),  # other extensions of the same formats
)
_SIDECAR_EXTENSIONS = frozenset(
    ("txt", "text", "md", "rst", "json", "jsonl", "xml", "csv", "tsv", "yaml", "yml", "toml", "ini", "cfg", "html")
    + ("htm", "log", "url", "pdf", "py", "sh", "sha256", "md5", "db", "lst", "info", "cls")
)
_SIDECAR_NAMES = frozenset(("license", "licence", "readme", "notice", "copying", "authors", "changelog", "citation"))
"""Sidecar files without an extension. Names that begin with _, such as _SUCCESS, are written by programs."""


def extension(name: str) -> str:
    """The extension in lower case: ``png`` for ``a.b.PNG``, "" without a dot."""
    name = os.path.basename(name)
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_image(name: str) -> bool:
    """Whether a file is read as an image."""
    return extension(name) in IMAGE_EXTENSIONS


def is_sidecar(name: str) -> bool:
    """Whether a file is a usual companion of images: captions, lists, notes. Any other file may be an image."""
    name = os.path.basename(name)
    return extension(name) in _SIDECAR_EXTENSIONS or name.startswith("_") or name.lower() in _SIDECAR_NAMES


def file_type(name: str) -> str:
    """The type under which a file that is not read is counted: ``.txt``."""
    return f".{ending}" if (ending := extension(name)) else "without extension"


def is_archive(name: str) -> bool:
    """Whether a file is a container of images: parquet, npz, tar."""
    return bool(archive_extension(name))


def archive_extension(name: str) -> str:
    """The extension in ``ARCHIVES`` of a container of images; "" for other and for hidden files."""
    name = os.path.basename(name)
    return "" if name.startswith(".") else next((ending for ending in ARCHIVES if name.lower().endswith(ending)), "")
