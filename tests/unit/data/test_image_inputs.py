"""Files that the image writer reads and leaves out, splits side by side, and numeric labels."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from titan_attent.data.images import ImageDataset, ImageSummary, write_images
from titan_attent.data.images.__main__ import main
from titan_attent.data.images.classes import Classes
from titan_attent.data.images.splits import file_splits, folder_splits

RNG = np.random.default_rng(6)
PIXELS = RNG.integers(0, 256, (12, 5, 5, 3), dtype=np.uint8)


def png(i: int, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[i]).save(file, file_format)
    return file.getvalue()


def make(root: Path, *names: str) -> Path:
    """Create files by name: the i-th, if a .png, has pixels i; others are empty."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i) if name.endswith(".png") else b"")
    return root


def archive(path: Path, num: int = 1) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for i in range(num):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.cls", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write(*inputs: Path, **options: Any) -> ImageSummary:
    output = inputs[0].parent / f"out{len(list(inputs[0].parent.iterdir()))}"
    return write_images(inputs, output=output, **{"num_threads": 1, **options})


def written(summary: ImageSummary) -> dict[str, list[int]]:
    """Indices into PIXELS of the written images, by class name."""
    pixels = np.fromfile(summary.path / "shard-00000.bin", np.uint8).reshape(-1, *PIXELS.shape[1:])
    labels = np.fromfile(summary.path / "shard-00000.labels.bin", "<i4")
    indices: dict[str, list[int]] = {}
    for image, label in zip(pixels, labels, strict=True):
        indices.setdefault(summary.classes[label], []).append(int((image == PIXELS).all((1, 2, 3)).argmax()))
    return indices


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "target", "outside"),
    [
        ("cat/again", "cat", False),
        ("cat/up", ".", False),
        ("cat/above", "..", False),
        ("cat/root", "/", False),
        ("cat/dogs", "dog", False),
        ("cat/deep/dogs", "dog/deep", False),
        ("all", ".", False),
        ("cat/more", "../other", True),
    ],
)
def test_each_real_folder_is_read_once_and_where_it_stands(
    link: str, target: str, outside: bool, tmp_path: Path
) -> None:
    root = make(tmp_path / "in", "cat/0.png", "dog/1.png", "dog/deep/2.png", "cat/deep/3.png")
    make(tmp_path / "other", "4.png", "sub/5.png")
    (root / link).symlink_to(root / target if target != "/" else target)
    if link == "cat/again":
        (root / "cat" / "twice").symlink_to("../cat")  # with two such links a naive walk would not end
    summary = write(root)
    images = {"cat": [0, 3], "dog": [1, 2]}
    if outside:
        images["cat"] += [0, 1]  # other/4.png is picture 0 of its own folder
    assert written(summary) == images
    assert summary.left_out.get("linked twice", 0) == (0 if outside else 2 if link == "cat/again" else 1)


def test_class_folders_may_be_links_but_not_to_the_same(tmp_path: Path) -> None:
    make(tmp_path / "store", "0.png", "1.png")
    root = make(tmp_path / "in", "dog/0.png")
    (root / "cat").symlink_to(tmp_path / "store")
    assert written(write(root)) == {"cat": [0, 1], "dog": [0]}
    (root / "lynx").symlink_to(tmp_path / "store")
    summary = write(root)
    assert written(summary) == {"cat": [0, 1], "dog": [0]} and summary.left_out == {"linked twice": 1}


def test_a_link_to_an_image_of_another_class_gives_no_copy(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "cat/0.png", "dog/1.png")
    (folder / "dog/a.png").symlink_to("../cat/0.png")
    (folder / "cat/z.png").symlink_to("../dog/1.png")
    summary = write(folder)
    assert written(summary) == {"cat": [0], "dog": [1]} and summary.left_out == {"linked twice": 2}


def test_a_folder_of_archives_by_its_name_in_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to archives of it give no copies either."""
    (tmp_path / "in").mkdir()
    archive(tmp_path / "in/b.tar", 2)
    (tmp_path / "in/a.tar").symlink_to("b.tar")
    monkeypatch.chdir(tmp_path / "in")
    summary = write_images([Path(".")], output=tmp_path / "out", num_threads=1)
    assert summary.num_images == 2 and summary.left_out == {"linked twice": 1}


def test_an_archive_without_an_image_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image in .*a\.tar; give inputs that hold images"):
        write(archive(tmp_path / "a.tar", 0))


def test_an_image_that_cannot_be_read_is_one_bad_image(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.png", "dog/1.png")
    (root / "cat" / "x.png").symlink_to("nowhere.png")
    (root / "cat" / "notes").symlink_to("nowhere.txt")
    os.mkfifo(root / "cat" / "pipe.png")  # which nobody writes to
    with pytest.raises(
        ValueError, match=r"cat/(pipe|x).png: cannot be read \((No such file|a pipe).*; (fix|replace) or remove it"
    ):
        write(root)
    summary = write(root, on_bad="skip")
    assert (summary.num_images, summary.skipped, summary.left_out) == (2, {"undecodable": 2}, {"dead link": 1})


def test_a_file_that_goes_away_is_one_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "in", "cat/0.png", "cat/1.png")
    stock = os.open

    def failing(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("cat/0.png"):
            raise PermissionError(13, "Permission denied")
        return stock(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(ValueError, match=r"cat/0.png: cannot be read \(Permission denied\)"):
        write(root)
    assert write(root, on_bad="skip").skipped == {"undecodable": 1}


# -- what is not read -------------------------------------------------------------------------------------------------


def test_other_files_are_counted_by_type(tmp_path: Path) -> None:
    names = ["cat/0.png", "cat/1.png", "cat/2.png", "cat/a.avif", "cat/b.JP2", "cat/c", "cat/.d.png", "README.md"]
    summary = write(make(tmp_path / "in", *names, "cat/0.txt", "cat/1.txt", ".git/x", "cat/deep/e.heic.txt"))
    assert summary.num_images == 3 and summary.skipped == {}
    assert summary.left_out == {".avif": 1, ".jp2": 1, "without extension": 1, "hidden": 2, ".md": 1, ".txt": 3}


def test_other_names_of_formats_that_are_read(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.png")
    for name, kind in (("1.jfif", "JPEG"), ("2.JPE", "JPEG"), ("3.apng", "PNG"), ("4.pnm", "PPM")):
        (root / "cat" / name).write_bytes(png(1, kind))
    summary = write(root)
    assert (summary.num_images, summary.left_out) == (5, {})


def test_the_greater_part_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.png", "dog/1.png", "cat/a.avif", "dog/b.avif", "notes.txt", "dog/c.heic")
    message = r"in: most of it is not read, left out 2 .avif \(first: .*cat/a.avif\), 1 .heic .* only 2 images or files"
    with pytest.raises(ValueError, match=message):
        write(root)
    assert write(root, on_bad="skip").left_out == {".avif": 2, ".heic": 1, ".txt": 1}
    (root / "dog" / "c.heic").unlink()
    assert write(root).left_out == {".avif": 2, ".txt": 1}
    only = make(tmp_path / "only", "cat/a.avif", "cat/b.avif")
    with pytest.raises(ValueError, match="most of it is not read, left out 2 .avif"):
        write(only)
    message = r"no input has a label \(.*only/cat: this class folder has no image \(jpg, .*\), but .avif; fill or"
    with pytest.raises(ValueError, match=message):
        write(only, on_bad="skip")


@pytest.mark.parametrize("name", ["old.tar", "old.parquet", "old.tgz"])
def test_an_archive_beside_class_folders(name: str, tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.png", "dog/1.png")
    if name == "old.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"image": [png(2)], "label": [0]}), root / name)
    else:
        archive(root / name)
    with pytest.raises(
        ValueError, match=r"in: most of it is not read, left out 2 .png \(first: .*cat/0.png\), and only 1 "
    ):
        write(root)
    summary = write(root, on_bad="skip")
    assert summary.left_out == {".png": 2} and summary.num_images == 1


def test_other_files_of_a_folder_of_archives_are_counted(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "README.md", "preview.png", "more/x.bin", ".cache/x", "_SUCCESS", "LICENSE")
    for i in range(2):
        archive(root / f"{i}.tar")
    summary, counts = write(root), {".md": 1, ".png": 1, ".bin": 1, "hidden": 1}
    assert (summary.num_images, summary.left_out) == (2, {**counts, "without extension": 2})
    for i in range(2):
        archive(root / "more" / f"{i}.tar")
    with pytest.raises(ValueError, match=r"in: most of it is not read, .*2 .tar \(first: .*more/0.tar\)"):
        write(root)


def test_an_npz_beside_class_folders_is_counted_and_a_folder_of_them_named(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.png", "dog/1.png", "a.npz")
    assert write(root).left_out == {".npz": 1}
    with pytest.raises(ValueError, match="has no folder in it; give .*only/a.npz, or a folder with one folder of imag"):
        write(make(tmp_path / "only", "a.npz"))


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train", "test"], ["test", "train"]),
        (["Train", "Validation", "extra"], ["Train", "Validation"]),
        (["train", "val", "test", "annotations"], ["test", "train", "val"]),
        (["TRAINING", "eval"], ["TRAINING", "eval"]),
        (["train2017", "val2017"], ["train2017", "val2017"]),
        (["train_images", "test_images"], ["test_images", "train_images"]),
        (["trainset", "dev"], ["dev", "trainset"]),
        (["trainImages", "valid"], ["trainImages", "valid"]),
        (["asl_alphabet_train", "asl_alphabet_test"], ["asl_alphabet_test", "asl_alphabet_train"]),
        (["valid", "test"], ["test", "valid"]),
        (["train"], ["train"]),
        (["car", "plane", "train"], []),
        (["bullet_train", "crash_test", "cat"], []),
        (["bullet_train", "cat"], []),
        (["training shoe", "cat"], []),
        (["contest", "testament", "strain"], []),
        (["cat", "dog"], []),
        ([], []),
    ],
)
def test_folders_that_are_splits(names: list[str], found: list[str]) -> None:
    assert folder_splits(names, top=True) == found
    assert folder_splits(names, top=False) == (found if len(names) > 1 else [])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], []),
        (["test.parquet", "train-00000.parquet", "train-00001.parquet"], ["test.parquet", "train-00000.parquet"]),
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], None),
        (["a-000.tar", "train-000.tar"], []),
        (["0.tar", "1.tar"], []),
    ],
)
def test_files_that_are_splits(names: list[str], found: list[str] | None) -> None:
    assert file_splits(names) == (names if found is None else found)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat/0.png", "test/cat/1.png"], "in: its folders test, train are splits .*such as .*in/train"),
        (["train/0.png", "val/1.png", "README.md"], "in: its folders train, val are splits .*such as .*in/train"),
        (["cat/train/0.png", "cat/test/1.png", "dog/train/2.png"], "in/cat: its folders test, train are splits"),
        (["images/a/train/0.png", "images/a/valid/1.png"], "in/images/a: its folders train, valid are splits"),
        (["train/cat/0.png"], "in: its folders train are splits"),
    ],
)
def test_splits_are_no_classes_unless_asked_for(names: list[str], message: str, tmp_path: Path) -> None:
    root = make(tmp_path / "in", *names)
    for on_bad in ("refuse", "skip"):
        with pytest.raises(ValueError, match=f"{message}.*, or add --all-splits to read all of them as classes"):
            write(root, on_bad=on_bad)
    summary = write(root, all_splits=True)
    assert summary.classes == tuple(sorted({name.split("/")[0] for name in names if "/" in name}))
    inner = sorted({name.split("/")[1] for name in names if name.startswith("train/cat/")})
    if inner:
        assert write(root / "train").classes == tuple(inner)


def test_files_of_several_splits_in_a_folder(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "README.md")
    for name in ("train-00000.tar", "test-00000.tar"):
        archive(root / name)
    with pytest.raises(
        ValueError, match=r"in: its files test-00000.tar, train-00000.tar are of several splits .*'.*/\*tr"
    ):
        write(root)
    assert write(root, all_splits=True).num_images == 2
    assert write(root / "train-00000.tar").num_images == 1


# -- labels that are numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat", "dog"], {"cat": 0, "dog": 1, 0: 0, 1: 1, "1": 1, 2: None, -1: None, "cow": None}),
        (["0", "1", "10", "11", "2"], {0: 0, 1: 1, 2: 4, 10: 2, "2": 4, "10": 2, 3: None, 4: None, "02": 4}),
        (["1", "2", "3"], {1: 0, 3: 2, 0: None, "3": 2}),
        (["00", "01", "02"], {0: 0, 2: 2, "02": 2, "2": 2, 3: None}),
        (["-1", "1"], {-1: 0, 1: 1, 0: None, "-1": 0}),
        (["1", "01", "2"], {"01": 1, "1": 0, 1: None, 2: None}),  # two classes are 1
        (["0", "1", "background"], {0: 0, 1: 1, 2: 2, "background": 2}),  # indices and names agree
        (["1", "0", "background"], {0: None, 1: None, 2: None, "0": 1}),  # ambiguous
        (["a", "0"], {0: None, 1: None, "0": 1, "a": 0}),
        (["9" * 30, "1"], {1: 1, "1": 1}),
        (["0", "1"], {"9" * 5000: None}),
    ],
)
def test_a_number_among_names_that_are_numbers_is_a_name(names: list[str], labels: dict[Any, int | None]) -> None:
    classes = Classes(names)
    for label, expected in labels.items():
        if expected is None:
            with pytest.raises(ValueError, match=f"^label '?{str(label)[:30]}"):
                classes.index(label)
        else:
            assert classes.index(label) == expected, label


def test_numbers_of_a_validation_set_mean_the_classes_of_the_training_set(tmp_path: Path) -> None:
    """For every file format, and with a given list in any order."""
    train = make(tmp_path / "train", *(f"{i}/{i}.png" for i in range(12)))
    trained = write(train)
    assert trained.classes == tuple(map(str, range(12)))  # by number, not by letter
    np.savez(tmp_path / "ints.npz", images=PIXELS, labels=np.arange(12))
    images = [{"bytes": png(i), "path": None} for i in range(12)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": list(range(12))}), tmp_path / "ints.parquet")
    with tarfile.open(tmp_path / "ints.tar", "w") as tar:
        for i in range(12):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.json", json.dumps({"label": i}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for given in (trained.classes, tuple(sorted(map(str, range(12)))), tuple(map(str, range(11, -1, -1)))):
        for name in ("ints.npz", "ints.parquet", "ints.tar"):
            summary = write(tmp_path / name, classes=given)
            assert summary.classes == given
            assert written(summary) == {str(i): [i] for i in range(12)}


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_in_one_line_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "in", "cat/0.png", "cat/1.png", "cat/a.avif", "cat/b.txt", "cat/c.txt")
    out = str(tmp_path / "out")
    assert main([str(root), "--output", out]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "warning: left out 2 .txt, 1 .avif (not read)"
    (root / "cat" / "x.png").write_bytes(b"")
    assert main([str(root), "--output", out + "2", "--on-bad", "skip"]) == 0
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning == f"warning: left out 1 undecodable; see {out}2/skipped.jsonl; and 2 .txt, 1 .avif (not read)"
    many = make(tmp_path / "many", *(f"cat/{i}.png" for i in range(12)), *(f"cat/x.kind{i}" for i in range(12)))
    assert main([str(many), "--output", out + "3"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(", 2 others (not read)")
    (tmp_path / "classes.txt").write_bytes("\ufeffcat\n".encode())
    assert main([str(many), "--output", out + "4", "--classes", str(tmp_path / "classes.txt")]) == 0
    assert ImageDataset(out + "4").classes == ("cat",)
    (tmp_path / "classes.txt").write_bytes("cat\n".encode("utf-16"))
    assert main([str(many), "--output", out + "5", "--classes", str(tmp_path / "classes.txt")]) == 2
    assert "classes.txt: the list of classes is not UTF-8 text" in capsys.readouterr().err


def test_without_any_image_the_message_has_the_reasons(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/notes.txt")
    (root / "cat" / "0.png").write_bytes(b"text")
    (root / "cat" / "1.png").write_bytes(b"")
    message = (
        r"in: no image in these inputs; give some that hold images. 2 undecodable \(first: .*cat/0.png: not an image "
        r".*; replace or remove it\); left out 1 .txt \(first: .*notes.txt\)$"
    )
    with pytest.raises(ValueError, match=message):
        write(root, on_bad="skip")
