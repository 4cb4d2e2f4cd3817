"""The image writer against a plain reference: Pillow and numpy on the source files of the inputs."""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from titan_attent.data.images import ImageDataset, ImageSummary, prepare, write_images, writer
from titan_attent.data.images.__main__ import main

N, SIDE = 23, 12
CLASSES = ["ape", "bee", "cat"]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.sort(RNG.integers(0, 3, N))
"""Sorted, so that a folder gives the same order as the other formats."""


def encoded(pixels: np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


FILES = [encoded(pixels) for pixels in PIXELS]


def make_folder(path: Path, files: list[bytes] = FILES, extension: str = "png") -> Path:
    for i, (data, label) in enumerate(zip(files, LABELS, strict=True)):
        deep = i > 3 + LABELS.tolist().index(label)
        file = path / CLASSES[label] / ("deep" if deep else "") / f"{i:03d}.{extension}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        (path / CLASSES[label] / "notes.txt").write_text("not an image")
    (path / ".hidden").mkdir()
    return path


def make_parquet(path: Path, *, binary: bool = False, names: bool = True) -> Path:
    images: list[Any] = FILES if binary else [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(FILES)]
    table = pyarrow.table({"image": images, "label": LABELS, "other": ["x"] * N})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def make_parquets(path: Path) -> Path:
    whole = pyarrow.parquet.read_table(make_parquet(path.parent / "whole.parquet"))
    path.mkdir()
    for part, start in enumerate((0, 9)):
        pyarrow.parquet.write_table(whole.slice(start, (9, N)[part]), path / f"train-{part:05d}.parquet")
    return path


def make_npz(path: Path, *, order: str = "C", packed: bool = False, first: bool = False, keys: Any = None) -> Path:
    images = PIXELS.transpose(0, 3, 1, 2) if first else PIXELS
    keys = keys or ("images", "labels")
    arrays = {keys[0]: np.array(images, order=order), keys[1]: LABELS.astype(np.uint8), "classes": np.array(CLASSES)}
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return path


def make_tar(
    path: Path, *, label: str = "cls", named: bool = True, files: list[bytes] = FILES, extension: str = "png"
) -> Path:
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for i, data in enumerate(files):
            value = CLASSES[LABELS[i]] if named else int(LABELS[i])
            text = str(value) + "\n" if label == "cls" else json.dumps({"label": value})
            add(tar, f"folder.x/{i:03d}.{extension}", data)
            add(tar, f"folder.x/{i:03d}.txt", b"a caption")
            add(tar, f"folder.x/{i:03d}.{label}", text.encode())
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


INPUTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "folder": (make_folder, {}),
    "hf.parquet": (make_parquet, {}),
    "binary.parquet": (make_parquet, {"binary": True}),
    "parquets": (make_parquets, {}),
    "plain.npz": (make_npz, {}),
    "packed.npz": (make_npz, {"packed": True}),
    "channels_first.npz": (make_npz, {"first": True}),
    "fortran.npz": (make_npz, {"order": "F"}),
    "xy.npz": (make_npz, {"keys": ("x", "y")}),
    "web.tar": (make_tar, {}),
    "web.tar.gz": (make_tar, {}),
    "json.tgz": (make_tar, {"label": "json"}),
}


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Pixels and labels of a raw data set, and its index, read without the package."""
    index = json.loads((folder / "index.json").read_text())
    names = [shard["file"] for shard in index["shards"]]
    shape = (-1, index["height"], index["width"], index["channels"])
    pixels = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names]).reshape(shape)
    labels = np.concatenate([np.fromfile(folder / name.replace(".bin", ".labels.bin"), "<i4") for name in names])
    return pixels, labels, index


def write(source: Any, output: Path, **options: Any) -> ImageSummary:
    return write_images([source], output=output, **{"num_threads": 1, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_format_gives_its_images(name: str, tmp_path: Path) -> None:
    make, options = INPUTS[name]
    summary = write(make(tmp_path / name, **options), tmp_path / "out", shard_images=10)
    pixels, labels, index = read(tmp_path / "out")
    np.testing.assert_array_equal(pixels, PIXELS)
    np.testing.assert_array_equal(labels, LABELS)
    assert [shard["num_images"] for shard in index["shards"]] == [10, 10, 3]
    assert index["classes"] == list(summary.classes) == CLASSES
    assert index["class_counts"] == list(summary.class_counts) == np.bincount(LABELS).tolist()
    np.testing.assert_allclose(index["mean"], (PIXELS / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(index["std"], (PIXELS / 255).std((0, 1, 2)), atol=1e-6)
    assert (summary.num_images, summary.num_shards, summary.num_bytes) == (N, 3, PIXELS.size)
    assert (index["encoding"], index["skipped"], summary.skipped) == ("raw", {}, {})
    dataset = ImageDataset(tmp_path / "out")
    dataset.check_sizes()
    dataset.verify_checksums()
    assert dataset.fingerprint == summary.fingerprint == index["fingerprint"]
    assert "skipped.jsonl" not in contents(tmp_path / "out") and len(contents(tmp_path / "out")) == 7


def test_all_formats_give_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    written = []
    for number, (name, threads) in enumerate([("folder", 1), ("folder", 3), ("web.tar", 2), ("plain.npz", 4)]):
        source = tmp_path / f"{number}-{name}"
        INPUTS[name][0](source, **INPUTS[name][1])
        write(source, tmp_path / f"out{number}", shard_images=10, num_threads=threads)
        written.append(contents(tmp_path / f"out{number}"))
    assert written[0] == written[1] == written[2] == written[3]


def test_threads_keep_the_order_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_CHUNK", 1)
    write(make_npz(tmp_path / "a.npz"), tmp_path / "out", num_threads=2)
    np.testing.assert_array_equal(read(tmp_path / "out")[0], PIXELS)


def test_folders_within_a_class_are_read_by_name(tmp_path: Path) -> None:
    for i, name in enumerate(("2", "c/1", "a/2", "a/1", "b/x/1", ".cache/1", "c/.1")):
        (tmp_path / "in" / "ape" / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "ape" / f"{name}.png").write_bytes(FILES[i])
    write(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out")[0], PIXELS[[0, 3, 2, 4, 1]])


def test_files_are_kept_byte_for_byte(tmp_path: Path) -> None:
    sizes = RNG.integers(8, 40, (N, 2)).tolist()
    formats = ["JPEG", "PNG", "WEBP"]
    files = [encoded(RNG.integers(0, 256, (*size, 3), dtype=np.uint8), formats[i % 3]) for i, size in enumerate(sizes)]
    write(make_folder(tmp_path / "in", files, "jpg"), tmp_path / "out", encoding="file", shard_images=10)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["height"], index["width"], index["channels"]) == (None, None, 3)
    kept = []
    for shard in index["shards"]:
        name = shard["file"].removesuffix(".bin")
        offsets = np.fromfile(tmp_path / "out" / f"{name}.offsets.bin", "<i8").tolist()
        data = (tmp_path / "out" / f"{name}.bin").read_bytes()
        assert len(data) == offsets[-1] == shard["num_bytes"] and len(offsets) == shard["num_images"] + 1
        kept += [data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    assert kept == files
    values = np.concatenate([np.asarray(Image.open(io.BytesIO(data))).reshape(-1, 3) for data in files]) / 255
    np.testing.assert_allclose(index["mean"], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(index["std"], values.std(0), atol=1e-6)
    dataset = ImageDataset(tmp_path / "out", size=10)
    dataset.verify_checksums()
    assert dataset.labels(torch.arange(N)).tolist() == LABELS.tolist()


@pytest.mark.parametrize("shape", [(32, 20), (20, 36), (10, 10), (5, 13)])
def test_size_resizes_the_shorter_side_and_crops_the_centre(shape: tuple[int, int], tmp_path: Path) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
    write(make_folder(tmp_path / "in", [encoded(np.asarray(image))] * N), tmp_path / "out", size=10)
    scale = 10 / min(shape)  # so that sides and crops are whole pixels
    whole = image.resize((int(shape[1] * scale), int(shape[0] * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - 10) // 2, (whole.height - 10) // 2
    expected = np.asarray(whole.crop((left, top, left + 10, top + 10)))
    pixels = read(tmp_path / "out")[0]
    assert pixels.shape == (N, 10, 10, 3)
    np.testing.assert_allclose(pixels, np.stack([expected] * N), atol=1)  # only rounding differs


MODES: dict[str, Callable[[np.ndarray], bytes]] = {
    "palette": lambda gray: as_png(Image.fromarray(gray).convert("P")),
    "alpha": lambda gray: as_png(Image.merge("RGBA", [Image.fromarray(gray)] * 3 + [Image.new("L", gray.shape, 9)])),
    "16 bits": lambda gray: as_png(Image.fromarray(gray.astype(np.uint16) * 256 + 77)),
    "gray": lambda gray: as_png(Image.fromarray(gray)),
    "gray with alpha": lambda gray: as_png(Image.fromarray(gray).convert("LA")),
    "turned": lambda gray: turned(gray),
    "cmyk": lambda gray: cmyk(gray),
    "moving": lambda gray: moving(gray),
}


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def turned(gray: np.ndarray) -> bytes:
    """Stored on its side, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    return encoded(np.rot90(gray), exif=exif)


def cmyk(gray: np.ndarray) -> bytes:
    file = io.BytesIO()
    zero = Image.new("L", gray.shape)
    Image.merge("CMYK", [zero, zero, zero, Image.fromarray(255 - gray)]).save(file, "TIFF")
    return file.getvalue()


def moving(gray: np.ndarray) -> bytes:
    file = io.BytesIO()
    first, second = Image.fromarray(gray), Image.fromarray(255 - gray)
    first.save(file, "GIF", save_all=True, append_images=[second])
    return file.getvalue()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grayscale", [True, False])
def test_every_mode_of_pixels_becomes_one_or_three_channels(mode: str, grayscale: bool, tmp_path: Path) -> None:
    gray = np.repeat(np.arange(SIDE, dtype=np.uint8)[:, None] * 20, SIDE, axis=1)
    summary = write(make_folder(tmp_path / "in", [MODES[mode](gray)] * N), tmp_path / "out", grayscale=grayscale)
    pixels, _, index = read(tmp_path / "out")
    assert index["channels"] == (1 if grayscale else 3)
    for channel in range(index["channels"]):
        assert np.abs(pixels[0, :, :, channel].astype(int) - gray).max() <= 1
    stored_gray = mode in ("16 bits", "gray", "gray with alpha", "turned")
    assert summary.all_gray == (stored_gray and not grayscale)


@pytest.mark.parametrize("shape", [(N, 9, 7), (N, 9, 7, 1), (N, 1, 9, 7), (N, 9, 7, 3), (N, 3, 9, 7), (N, 9, 7, 4)])
def test_layouts_of_arrays(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=images, y=LABELS[:, None])
    write(tmp_path / "a.npz", tmp_path / "out", grayscale=len(shape) == 3 or 1 in shape)
    pixels, labels, index = read(tmp_path / "out")
    images = images[..., None] if len(shape) == 3 else images if shape[1] == 9 else images.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels, images[..., :3])
    assert index["classes"] == ["0", "1", "2"] and labels.tolist() == LABELS.tolist()


def test_sources_have_shards_of_their_own(tmp_path: Path) -> None:
    make_npz(tmp_path / "a.npz")
    make_npz(tmp_path / "b.npz")
    inputs = [f"web={tmp_path}/a.npz", f"web={tmp_path}/b.npz", f"photo={tmp_path}/*.npz", tmp_path / "a.npz"]
    summary = write_images(inputs, output=tmp_path / "out", shard_images=40)
    assert summary.source_images == {"web": 2 * N, "photo": 2 * N, "default": N}
    dataset = ImageDataset(tmp_path / "out")
    assert dataset.sources == [("web", 0), ("photo", 2 * N), ("default", 4 * N)]
    assert [entry.num_images for entry in dataset.shards.index.shards] == [40, 6, 40, 6, N]
    pixels, _, _ = read(tmp_path / "out")
    np.testing.assert_array_equal(pixels, np.concatenate([PIXELS] * 5))


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (lambda path: make_tar(path / "a.tar"), CLASSES),
        (lambda path: make_tar(path / "a.tar", named=False), ["0", "1", "2"]),
        (lambda path: make_tar(path / "a.tar.gz", named=False, label="json"), ["0", "1", "2"]),
        (lambda path: make_parquet(path / "a.parquet", names=False), ["0", "1", "2"]),
    ],
)
def test_classes_from_the_inputs(make: Callable[[Path], Path], classes: list[str], tmp_path: Path) -> None:
    summary = write(make(tmp_path), tmp_path / "out")
    assert list(summary.classes) == classes
    assert read(tmp_path / "out")[1].tolist() == LABELS.tolist()


def test_given_classes_define_the_labels(tmp_path: Path) -> None:
    given = ["dog", "cat", "bee", "ape"]
    summary = write(make_folder(tmp_path / "in"), tmp_path / "out", classes=given)
    assert summary.class_counts == (0, *np.bincount(LABELS)[::-1].tolist())
    assert [given[label] for label in read(tmp_path / "out")[1]] == [CLASSES[label] for label in LABELS]
    summary = write(make_parquet(tmp_path / "b.parquet"), tmp_path / "out2", classes=given)
    assert [given[label] for label in read(tmp_path / "out2")[1]] == [CLASSES[label] for label in LABELS]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["cats.npz", "dogs.npz"], {}, r"different classes, a, b and b, a; give the classes in order with --classes"),
        (
            ["folder", "plain.npz"],
            {},
            r"labels are names \(ape, bee, cat\) and others are numbers; give the classes",
        ),
        (["wild.npz"], {}, r"the largest label is 100000; give the classes in order with --classes"),
        (["unlabelled.npz"], {}, "no input has a label; give the classes"),
        (["folder"], {"classes": []}, "no classes"),
        (["folder"], {"classes": ["ape", "bee", "cat", "bee"]}, "'bee' appears twice"),
        (["folder"], {"classes": ["ape", "bee"]}, r"label 'cat' is not one of the classes \(ape, bee\); correct it"),
        (["plain.npz"], {"classes": ["a", "b"]}, r"plain.npz: image \d+: label 2 is outside \[0, 2\), the classes"),
    ],
)
def test_ambiguous_classes(inputs: list[str], options: Any, message: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "folder")
    images = np.zeros((2, 4, 4), np.uint8)
    for name, more in (("cats", ["a", "b"]), ("dogs", ["b", "a"])):
        np.savez(tmp_path / f"{name}.npz", x=images, y=[0, 1], classes=np.array(more))
    for name, labels in (("wild", [0, 100_000]), ("unlabelled", [-1, -1])):
        np.savez(tmp_path / f"{name}.npz", x=images, y=labels)
    np.savez(tmp_path / "plain.npz", x=PIXELS, y=LABELS)
    with pytest.raises(ValueError, match=message):
        write_images([tmp_path / name for name in inputs], output=tmp_path / "out", **options)
    assert not (tmp_path / "out" / "index.json").exists()


def test_members_of_a_tar_file(tmp_path: Path) -> None:
    """Keys end at the first dot. Numbers in text are numbers, and define the order of the classes."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, number in enumerate((10, 2, 0)):
            add(tar, f"{i}.png", FILES[i])
            add(tar, f"{i}.mask.png", FILES[9])
            add(tar, f"{i}.cls", b"%d" % number)
        add(tar, "._0.png", b"what other systems leave")
    summary = write(tmp_path / "a.tar", tmp_path / "out")
    pixels, labels, _ = read(tmp_path / "out")
    np.testing.assert_array_equal(pixels, PIXELS[:3])
    assert labels.tolist() == [10, 2, 0] and summary.classes == tuple(map(str, range(11)))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for extension in ("png", "jpg"):
            add(tar, f"9.{extension}", FILES[0])
    with pytest.raises(ValueError, match=r"a.tar: 9: both jpg and png; write one image per key"):
        write(tmp_path / "a.tar", tmp_path / "out2")


# -- what is bad -------------------------------------------------------------------------------------------------------


def bad_folder(path: Path, name: str, data: bytes) -> Path:
    make_folder(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(data)
    return path


def bad_parquet(path: Path, image: Any, label: int | None) -> Path:
    images = [{"bytes": data, "path": ""} for data in FILES]
    images[5] = image
    labels: list[int | None] = LABELS.tolist()
    labels[5] = label
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(images, image_type), "label": pyarrow.array(labels, pyarrow.int64())})
    features = {"label": {"names": CLASSES}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)
    return path


def bad_tar(path: Path, name: str, data: bytes) -> Path:
    """A tar of good examples and one more member with its own key."""
    make_tar(path)
    with tarfile.open(path, "a") as tar:
        add(tar, name, data)
        add(tar, "zz.png", FILES[0])
        add(tar, "zz.cls", b"ape")
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def cut_between_members(path: Path) -> Path:
    """Cut after the last whole member, so that only the end mark is missing."""
    with tarfile.open(make_tar(path)) as tar:
        end = tar.getmembers()[-1].offset_data + tarfile.BLOCKSIZE
    path.write_bytes(path.read_bytes()[:end])
    return path


def damaged_npz(path: Path) -> Path:
    data = bytearray(make_npz(path).read_bytes())
    at = data.index(PIXELS[20].tobytes()[:64])
    data[at] ^= 1
    path.write_bytes(data)
    return path


def bad_shape() -> bytes:
    return encoded(np.zeros((SIDE, SIDE + 1, 3), np.uint8))


def bomb() -> bytes:
    """A PNG that claims 30,000 x 30,000 pixels."""
    data = bytearray(FILES[0])
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


TORN = FILES[3][: len(FILES[3]) // 2]
BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "text": (lambda p: bad_folder(p / "in", "bee/x.png", b"text"), r"in/bee/x.png: not an image .*Unidentified", "und"),
    "empty": (lambda p: bad_folder(p / "in", "bee/x.png", b""), r"in/bee/x.png: no bytes; replace or remove it", "und"),
    "torn": (lambda p: bad_folder(p / "in", "bee/x.png", TORN), r"in/bee/x.png: not an image that Pillow reads", "und"),
    "bomb": (lambda p: bad_folder(p / "in", "bee/x.png", bomb()), r"x.png: .*DecompressionBombError", "und"),
    "32 bits": (
        lambda p: bad_folder(p / "in", "bee/x.tif", encoded(np.zeros((SIDE, SIDE), np.float32), "TIFF")),
        r"bee/x.tif: has pixels of 32 bits \(Pillow's mode F\)",
        "und",
    ),
    "size": (
        lambda p: bad_folder(p / "in", "bee/x.png", bad_shape()),
        r"x.png: is 13 x 12 pixels, but the first image, .*ape.*, is 12 x 12; resize all images with --size N",
        "size",
    ),
    "stray": (
        lambda p: bad_folder(p / "in", "x.png", FILES[0]),
        r"in/x.png: an image outside of the class fol",
        "label",
    ),
    "no images": (
        lambda p: bad_folder(p / "in", "dog/x.txt", b""),
        r"in/dog: this class folder has no image \(jpg, .*\); fill or remove it",
        "class",
    ),
    "a null": (lambda p: bad_parquet(p / "a.parquet", None, 0), r"a.parquet: row 6: no bytes in 'image'", "und"),
    "a path": (
        lambda p: bad_parquet(p / "a.parquet", {"bytes": None, "path": "x"}, 0),
        r"a.parquet: row 6: no bytes in 'image': the image is null or only a path; embed",
        "und",
    ),
    "a bad row": (
        lambda p: bad_parquet(p / "a.parquet", {"bytes": b"?", "path": ""}, 0),
        r"a.parquet: row 6: not an image",
        "und",
    ),
    "a label": (
        lambda p: bad_parquet(p / "a.parquet", {"bytes": FILES[5], "path": ""}, -1),
        r"row 6: label -1 is outside \[0, 3\), the classes of the file; correct or remove the row",
        "label",
    ),
    "no label": (
        lambda p: bad_parquet(p / "a.parquet", {"bytes": FILES[5], "path": ""}, None),
        r"a.parquet: row 6: no label",
        "label",
    ),
    "a member": (lambda p: bad_tar(p / "a.tar", "y.png", TORN), r"a.tar: y.png: no label: neither .cls nor", "label"),
    "a lone label": (lambda p: bad_tar(p / "a.tar", "y.cls", b"ape"), r"a.tar: y: no image \(jpg, jpeg, pn", "und"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_refused_or_skipped(case: str, tmp_path: Path) -> None:
    make, message, reason = BAD[case]
    source = make(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*, or leave out what cannot be used with --on-bad skip$"):
        write(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    summary = write(source, tmp_path / "out", on_bad="skip", num_threads=2)
    (name,) = summary.skipped
    assert name.startswith(reason) and summary.skipped[name] == 1
    pixels, _, index = read(tmp_path / "out")
    good = (
        np.delete(PIXELS, 5, axis=0)
        if case.startswith(("a null", "a path", "a bad", "a label", "no label"))
        else PIXELS
    )
    np.testing.assert_array_equal(pixels[: len(good)], good)
    assert len(pixels) == summary.num_images == len(good) + case.startswith(("a member", "a lone"))
    assert index["skipped"] == summary.skipped and index["classes"] == CLASSES
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["reason"] == name and record["where"].startswith(str(source))


@pytest.mark.parametrize("classes", [None, CLASSES])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_that_is_no_class(classes: list[str] | None, wrong: int, tmp_path: Path) -> None:
    """With classes listed in the file, given, or found in the labels; then label 3 only adds a class."""
    labels = [0, wrong, 2]
    listed = plain_npz(tmp_path / "listed.npz", x=PIXELS[:3], y=labels, classes=np.array(CLASSES))
    plain = plain_npz(tmp_path / "plain.npz", x=PIXELS[:3], y=labels)
    for source in (listed, plain) if classes or wrong < 0 else (listed,):
        with pytest.raises(
            ValueError, match=rf"{source.name}: image 1: label {wrong} is outside \[0, 3\), the classes"
        ):
            write(source, tmp_path / "out", classes=classes)
        output = tmp_path / f"out-{source.stem}"
        assert write(source, output, classes=classes, on_bad="skip").skipped == {"label": 1}
        assert read(output)[1].tolist() == [0, 2]


DAMAGED: dict[str, tuple[Callable[[Path], Path], str, int]] = {
    "tar in a member": (lambda p: cut(make_tar(p / "a.tar"), 0.5), "after member .*: truncated or not a tar file", 5),
    "tar between members": (lambda p: cut_between_members(p / "a.tar"), "no end-of-archive mark", N - 1),
    "tar.gz": (lambda p: cut(make_tar(p / "a.tar.gz"), 0.7), "after member .*: truncated or not a tar file", 5),
    "npz": (lambda p: damaged_npz(p / "a.npz"), r"after image \d+: the file is damaged \(Bad CRC-32", 0),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_or_ends_early(case: str, tmp_path: Path) -> None:
    make, message, min_images = DAMAGED[case]
    source = make(tmp_path)
    more = make_npz(tmp_path / "more.npz")
    with pytest.raises(ValueError, match=message):
        write_images([source, more], output=tmp_path / "out", classes=CLASSES)
    summary = write_images([source, more], output=tmp_path / "out", classes=CLASSES, on_bad="skip")
    pixels, labels, _ = read(tmp_path / "out")
    before = len(pixels) - N
    assert min_images <= before <= N and summary.skipped == {"damaged": 1}
    np.testing.assert_array_equal(pixels, np.concatenate([PIXELS[:before], PIXELS]))
    assert labels.tolist() == [*LABELS[:before], *LABELS]


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    data = bytearray(make_parquet(tmp_path / "a.parquet").read_bytes())
    at = data.index(FILES[15][:40])
    data[at - 60 : at] = b"\xff" * 60
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.parquet: (after row \d+: the file is damaged|row 16: not an image)"):
        write(tmp_path / "a.parquet", tmp_path / "out")


def plain_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


ZEROS, TWO = np.zeros((2, 5, 5), np.uint8), np.zeros(2, np.int64)
UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p / "none", "none: no such file or folder; correct the path"),
    "kind": (lambda p: bad_folder(p, "x.zip", b"") / "x.zip", "x.zip: unsupported file format; give .parquet, .npz"),
    "no folder": (
        lambda p: cut(bad_folder(p / "in", "a.txt", b"") / "a.txt", 1).parent / "ape" / "deep",
        "has no folder",
    ),
    "columns": (
        lambda p: written_table(p / "a.parquet", {"picture": [b""], "label": [0]}),
        "a.parquet: none of image, .* for the images; choose the names .* with --keys IMAGE,LABEL, from picture, label",
    ),
    "two columns": (
        lambda p: written_table(p / "a.parquet", {"img": [b""], "image": [b""], "label": [0]}),
        r"both \['image', 'img'\] for the images",
    ),
    "images": (
        lambda p: written_table(p / "a.parquet", {"image": [1.0], "label": [0]}),
        "column 'image' is double; im",
    ),
    "labels": (
        lambda p: written_table(p / "a.parquet", {"image": [b""], "label": [0.5]}),
        "column 'label' is double; l",
    ),
    "no table": (lambda p: bad_folder(p, "a.parquet", b"PAR1") / "a.parquet", "damaged or not a parquet file"),
    "no zip": (lambda p: bad_folder(p, "a.npz", b"PK") / "a.npz", "a.npz: damaged or not a .npz file"),
    "floats": (lambda p: plain_npz(p / "a.npz", x=ZEROS / 1, y=TWO), "array 'x' is float64, not uint8; scale it"),
    "pickles": (lambda p: plain_npz(p / "a.npz", x=ZEROS, y=np.array([{}, {}])), "its arrays cannot be read"),
    "shape": (lambda p: plain_npz(p / "a.npz", x=ZEROS[0], y=TWO), r"has shape \(5, 5\), not clearly \[N, H, W\]"),
    "zero pixels": (lambda p: plain_npz(p / "a.npz", x=ZEROS[:, :0], y=TWO), r"has shape \(2, 0, 5\), not clearly"),
    "layout": (
        lambda p: plain_npz(p / "a.npz", x=np.zeros((2, 3, 5, 3), np.uint8), y=TWO),
        r"shape \(2, 3, 5, 3\), not clearly .*; reshape it to \[N, H, W, C\] in which only one of H and C is 1, 3 or 4",
    ),
    "lengths": (lambda p: plain_npz(p / "a.npz", x=ZEROS, y=TWO[:1]), r"int64 of shape \(1,\); labels are integers"),
    "float labels": (lambda p: plain_npz(p / "a.npz", x=ZEROS, y=TWO / 1), r"array 'y' is float64 of shape \(2,\)"),
    "classes": (lambda p: plain_npz(p / "a.npz", x=ZEROS, y=TWO, classes=TWO), "'classes' is int64 .*, not a list"),
}


def written_table(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_input_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    make, message = UNREADABLE[case]
    with pytest.raises(ValueError, match=message):
        write(make(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_folder_of_archives_names_the_input(tmp_path: Path) -> None:
    make_parquet(tmp_path / "in" / "data" / "a.parquet")
    (tmp_path / "in" / "ape").mkdir()
    (tmp_path / "in" / "ape" / "x.png").write_bytes(FILES[0])
    with pytest.raises(ValueError, match=rf"in/data: this class folder has no image .*; give {tmp_path}/in/data as"):
        write(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "jpeg"}, "encoding is 'jpeg'; set it to raw or file"),
        ({"on_bad": "ignore"}, "on_bad is 'ignore'; set it to refuse or skip"),
        ({"size": -1}, "size is -1"),
        ({"shard_images": 0}, "shard_images is 0; set it to 1 or more"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"encoding": "file", "size": 8}, "encoding file keeps images as they are: omit size"),
        ({"encoding": "file"}, "encoding file stores files, but a .npz file holds pixels"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(make_npz(tmp_path / "a.npz"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_format_that_is_not_stored(tmp_path: Path) -> None:
    files = [encoded(PIXELS[0], "BMP")] * N
    with pytest.raises(ValueError, match="is BMP, but encoding file stores JPEG, PNG and WebP; convert it, or write"):
        write(make_folder(tmp_path / "in", files, "bmp"), tmp_path / "out", encoding="file")


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["raw", "file"])
def test_a_killed_writer_leaves_no_data_set(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "in")
    write(source, tmp_path / "whole", shard_images=5, encoding=encoding)
    with monkeypatch.context() as patched:
        calls = []

        def stop(*args: Any, **kwargs: Any) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt

        patched.setattr(writer, "remove_leftovers", lambda folder: None)  # as if killed
        finish = writer.ImageShardWriter.finish
        patched.setattr(writer.ImageShardWriter, "finish", lambda self: stop() or finish(self))
        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "out", shard_images=5, encoding=encoding)
    left = contents(tmp_path / "out")
    assert "index.json" not in left and "shard-00001.bin" in left and "shard-00002.bin" not in left
    (tmp_path / "out" / "shard-00007.bin.tmp").write_bytes(b"half a shard")
    (tmp_path / "out" / "mine.txt").write_text("stays")
    with pytest.raises(ValueError, match="out: not a data set of images, no index.json in it"):
        ImageDataset(tmp_path / "out", size=4)
    write(source, tmp_path / "out", shard_images=5, encoding=encoding)
    (tmp_path / "out" / "mine.txt").unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_error_removes_what_was_written(tmp_path: Path) -> None:
    source = bad_folder(tmp_path / "in", "cat/zzz.png", b"text")
    with pytest.raises(ValueError, match=r"zzz.png"):
        write(source, tmp_path / "out", shard_images=5)
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_not_free(tmp_path: Path) -> None:
    source = make_npz(tmp_path / "a.npz")
    write(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="out: holds a finished data set; choose another --output, or delete it"):
        write(source, tmp_path / "out")
    writer.remove_leftovers(tmp_path / "out")  # as after an interrupt right after the last write
    assert contents(tmp_path / "out") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file; choose a folder"):
        write(source, tmp_path / "file")
    folder = make_folder(tmp_path / "in")
    with pytest.raises(ValueError, match="in/out: lies inside the input"):
        write(folder, folder / "out")
    for name in ("shard-00000.bin", "progress.json"):
        tokens = tmp_path / name
        tokens.mkdir()
        (tokens / name).write_bytes(b"tokens")
        with pytest.raises(ValueError, match="holds shards of another format"):
            write(source, tokens)
        assert (tokens / name).read_bytes() == b"tokens"


def test_no_image_at_all(tmp_path: Path) -> None:
    source = bad_parquet(tmp_path / "a.parquet", None, None)
    table = pyarrow.parquet.read_table(source).slice(5, 1)
    pyarrow.parquet.write_table(table, source)
    with pytest.raises(ValueError, match="no image in these inputs; give some that hold images"):
        write(source, tmp_path / "out", on_bad="skip")
    assert not list((tmp_path / "out").iterdir())


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_npz(tmp_path / "a.npz", keys=("pictures", "what"))
    bad_folder(tmp_path / "in", "bee/x.png", b"")
    (tmp_path / "classes.txt").write_text("ape\nbee\n\ncat\ndog\n")
    out = str(tmp_path / "out")
    arguments = [f"a={tmp_path}/a.npz", f"b={tmp_path}/in", "--output", out, "--size", "6", "--on-bad", "skip"]
    assert main([*arguments, "--keys", "pictures,what", "--classes", str(tmp_path / "classes.txt")]) == 0
    printed = capsys.readouterr()
    assert f"left out 1 undecodable; see {out}/skipped.jsonl" in printed.err
    assert "no image of 1 classes (dog)" in printed.err
    assert f"{out}: {2 * N} images of 4 classes, 0.0 MB in 2 shards" in printed.out
    assert f"a: {N} images (50.0%)" in printed.out and f'ImageDataset("{out}")' in printed.out
    assert ImageDataset(out).classes == (*CLASSES, "dog") and ImageDataset(out).size == 6
    gray = ["--grayscale", "--classes", "ape,bee,cat", "--keys", "pictures,what", "--encoding", "raw"]
    assert main([f"{tmp_path}/a.npz", "--output", f"{out}2", *gray]) == 0
    assert ImageDataset(f"{out}2").channels == 1
    gray_only = plain_npz(tmp_path / "gray.npz", x=ZEROS, y=TWO)
    assert main([str(gray_only), "--output", f"{out}3", "--num-threads", "1"]) == 0
    assert "all of them are gray: --grayscale writes a third" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--output", "out"], "error: none: no such file or folder"),
        (["a.npz", "--output", "out", "--keys", "x"], "--keys is 'x'; give two names, IMAGE,LABEL"),
        (["a.npz", "--output", "/dev/null/out"], "error: "),
    ],
)
def test_errors_are_printed_in_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make_npz(tmp_path / "a.npz")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_gzip_that_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"text" * 500))
    with pytest.raises(ValueError, match=r"a.tar.gz: truncated or not a tar file"):
        write(tmp_path / "a.tar.gz", tmp_path / "out", classes=CLASSES)
