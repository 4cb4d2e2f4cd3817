"""Splits of a data set by the names of folders and files: train, val and test side by side are not to be mixed.

A name is of a split if one of its words is: ``Train``, ``test_images``, ``val2017``, ``train-00000-of-00002.parquet``.
"""

import re
from collections.abc import Iterable

_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "develop", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout", "heldout"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_NEUTRAL = frozenset(
    (
        "set",
        "dataset",
        "data",
        "image",
        "images",
        "img",
        "imgs",
        "photo",
        "photos",
        "pic",
        "pics",
        "picture",
        "pictures",
    )
    + (
        "split",
        "folder",
        "dir",
        "files",
        "part",
        "new",
        "final",
        "full",
        "small",
        "large",
        "sample",
        "samples",
        "crops",
    )
    + ("seg", "class", "classes")
)


def _read(name: str) -> tuple[set[str], bool]:
    """The splits that the words of a name are, and whether it has no other word."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    words = [word if word in _SPLITS else word.removesuffix("set") for word in words]
    found = {_SPLITS[word] for word in words if word in _SPLITS}
    return found, bool(found) and all(word in _SPLITS or word in _NEUTRAL or not word for word in words)


def folder_splits(names: Iterable[str], *, top: bool) -> list[str]:
    """Those of folders beside each other that are splits, not classes, sorted; [] if there are none.

    Two of different splits are; so is any at the ``top``, where all are. A name with other words, such as
    ``bullet_train``, counts only where all have some split's word.
    """
    read = {name: _read(name) for name in names}
    alone = [name for name, (_, whole) in read.items() if whole]
    everything = all(found for found, _ in read.values())
    candidates = list(read) if everything else alone
    splits = set().union(*(read[name][0] for name in candidates))
    if len(splits) > 1 or (top and alone and len(alone) == len(read)):
        return sorted(candidates)
    return []


def file_splits(names: Iterable[str]) -> list[str]:
    """One file of each split, if there are several: ``["test-00000.parquet", "train-00000.parquet"]``; else []."""
    first: dict[frozenset[str], str] = {}
    for name in sorted(names):
        if found := _read(name)[0]:
            first.setdefault(frozenset(found), name)
    return sorted(first.values()) if len(first) > 1 else []
