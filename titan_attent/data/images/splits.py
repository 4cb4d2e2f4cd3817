"""Recognizes the splits of a data set by the names of folders and files, so that train, val and test are not mixed.

A name belongs to a split if one of its words does: ``Train``, ``test_images``, ``val2017``,
``train-00000-of-00002.parquet``.
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


def _parse(name: str) -> tuple[set[str], bool]:
    """The splits that the words of a name stand for, and whether its other words are all neutral."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    words = [word if word in _SPLITS else word.removesuffix("set") for word in words]
    splits = {_SPLITS[word] for word in words if word in _SPLITS}
    return splits, bool(splits) and all(word in _SPLITS or word in _NEUTRAL or not word for word in words)


def folder_splits(names: Iterable[str], *, top: bool) -> list[str]:
    """The names of sibling folders that are splits rather than classes, sorted; [] if there are none.

    They are splits if there are at least two different ones. At the ``top`` one is enough if all folders are splits. A
    name with other words, such as ``bullet_train``, counts only if every name has a word of a split.
    """
    parsed = {name: _parse(name) for name in names}
    pure = [name for name, (_, is_pure) in parsed.items() if is_pure]
    all_have_splits = all(splits for splits, _ in parsed.values())
    candidates = list(parsed) if all_have_splits else pure
    splits = set().union(*(parsed[name][0] for name in candidates))
    if len(splits) > 1 or (top and pure and len(pure) == len(parsed)):
        return sorted(candidates)
    return []


def file_splits(names: Iterable[str]) -> list[str]:
    """One file per split if there are several splits, else []: ``["test-00000.parquet", "train-00000.parquet"]``."""
    first: dict[frozenset[str], str] = {}
    for name in sorted(names):
        if splits := _parse(name)[0]:
            first.setdefault(frozenset(splits), name)
    return sorted(first.values()) if len(first) > 1 else []
