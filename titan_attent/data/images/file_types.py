"""Kinds of files by their names: images that are read, and what usually stands beside images."""

import os

ARCHIVES = (".parquet", ".npz", ".tar", ".tar.gz", ".tgz")
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"),
    *("jpe", "jfif", "jif", "pjpeg", "apng", "pbm", "pnm"),  # other names of the same formats
)
_BESIDE = frozenset(
    ("txt", "text", "md", "rst", "json", "jsonl", "xml", "csv", "tsv", "yaml", "yml", "toml", "ini", "cfg", "html")
    + ("htm", "log", "url", "pdf", "py", "sh", "sha256", "md5", "db", "lst", "info", "cls")
)
_NAMES_BESIDE = frozenset(("license", "licence", "readme", "notice", "copying", "authors", "changelog", "citation"))
"""Without an extension; what begins with _, such as _SUCCESS, is a note of a program."""


def extension(name: str) -> str:
    """``png`` of ``a.b.PNG``; "" without a dot."""
    name = os.path.basename(name)
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_image(name: str) -> bool:
    """Whether a file is read as an image."""
    return extension(name) in IMAGE_EXTENSIONS


def is_beside(name: str) -> bool:
    """Whether a file is what usually stands beside images: captions, lists, notes; anything else may be an image."""
    name = os.path.basename(name)
    return extension(name) in _BESIDE or name.startswith("_") or name.lower() in _NAMES_BESIDE


def describe(name: str) -> str:
    """What a file that is not read counts as: ``.txt``."""
    return f".{kind}" if (kind := extension(name)) else "without extension"


def is_archive(name: str) -> bool:
    """Whether a file is one that holds images: parquet, npz, tar."""
    return bool(kind_of_archive(name))


def kind_of_archive(name: str) -> str:
    """The extension of a kind of file that holds images, "" of others and of hidden ones."""
    name = os.path.basename(name)
    return "" if name.startswith(".") else next((kind for kind in ARCHIVES if name.lower().endswith(kind)), "")
