"""Image data sets on disk: reading, the cost of opening, and the detection of damage."""

import builtins
import hashlib
import io
import json
import os
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from titan_attent.data.images import ImageDataset, write_images
from titan_attent.data.images.format import ImageShardEntry, check_classes, read_index, write_index

N, SIDE = 57, 6
RNG = np.random.default_rng(1)
PIXELS = RNG.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.sort(RNG.integers(0, 4, N))
"""Sorted, as a folder sorts its classes."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "a.npz", images=PIXELS, labels=LABELS, classes=np.array(list("abcd")))
    write_images([f"one={folder}/a.npz", f"two={folder}/a.npz"], output=folder / "raw", shard_images=20)
    return folder / "raw"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(PIXELS):
        path = folder / "in" / "abcd"[LABELS[i]] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    write_images([folder / "in"], output=folder / "files", encoding="file", shard_images=20)
    return folder / "files"


@pytest.fixture(params=["raw", "files"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy"))


def opened(folder: Path, **options: Any) -> ImageDataset:
    return ImageDataset(folder, **{"size": SIDE, **options})


def normalised(pixels: np.ndarray, folder: Path) -> np.ndarray:
    index = json.loads((folder / "index.json").read_text())
    return ((pixels / 255 - index["mean"]) / index["std"]).transpose(0, 3, 1, 2)


# -- what is read -----------------------------------------------------------------------------------------------------


def test_pixels_and_labels_of_any_ids(copy: Path) -> None:
    dataset = opened(copy)
    copies = len(dataset) // N
    pixels, labels = np.concatenate([PIXELS] * copies), np.concatenate([LABELS] * copies)
    expected = normalised(pixels, copy)
    scattered = torch.from_numpy(RNG.integers(0, len(dataset), 200))
    for ids in (torch.arange(len(dataset)), torch.arange(len(dataset)).flip(0), scattered, torch.tensor([19, 20, 21])):
        read, read_labels = dataset.pixels(ids, None)
        assert read.dtype == torch.float32 and read.shape == (len(ids), 3, SIDE, SIDE) and read.is_contiguous()
        np.testing.assert_allclose(read, expected[ids], atol=2e-6)
        assert read_labels.dtype == torch.int64 and read_labels.tolist() == labels[ids].tolist()
        assert torch.equal(dataset.labels(ids), read_labels)
        assert torch.equal(dataset.pixels(ids, (3, 1))[0], read)  # without augmentation a visit key changes nothing
    read, read_labels = dataset.pixels(torch.empty(0, dtype=torch.int64), None)
    assert read.shape == (0, 3, SIDE, SIDE) and read_labels.shape == (0,)
    assert np.asarray(dataset.thumbnail(33)).tolist() == pixels[33].tolist()
    assert (dataset.classes, dataset.channels, dataset.size) == (tuple("abcd"), 3, SIDE)
    assert dataset.locate(19) == ("shard-00000.bin", 19) and dataset.locate(20) == ("shard-00001.bin", 0)


def test_ids_outside(copy: Path) -> None:
    dataset = opened(copy)
    for wrong in (-1, len(dataset)):
        for read in (
            dataset.labels,
            lambda ids: dataset.pixels(ids, None),
            lambda ids: dataset.thumbnail(int(ids[-1])),
        ):
            with pytest.raises(IndexError, match=rf"copy: example id {wrong} is outside \[0, {len(dataset)}\)"):
                read(torch.tensor([0, wrong]))
        with pytest.raises(IndexError, match=f"example id {wrong} "):
            dataset.locate(wrong)


def test_threads_and_copies_read_the_same(copy: Path) -> None:
    dataset = opened(copy)
    expected = dataset.pixels(torch.arange(len(dataset)), None)[0]
    again = pickle.loads(pickle.dumps(dataset))
    with ThreadPoolExecutor(8) as threads:
        ids = [torch.from_numpy(RNG.integers(0, len(dataset), 9)) for _ in range(60)]
        assert all(
            torch.equal(read[0], expected[i])
            for i, read in zip(ids, threads.map(lambda i: again.pixels(i, None), ids), strict=True)
        )
    assert again.fingerprint == dataset.fingerprint


def test_sources(raw: Path, files: Path) -> None:
    assert opened(raw).sources == [("one", 0), ("two", N)]
    assert opened(files).sources == [("default", 0)]


def test_another_size_is_resized(raw: Path) -> None:
    dataset = opened(raw, size=4)
    expected = [np.asarray(Image.fromarray(p).resize((4, 4), Image.Resampling.BILINEAR)) for p in PIXELS]
    np.testing.assert_allclose(dataset.pixels(torch.arange(N), None)[0], normalised(np.stack(expected), raw), atol=2e-6)


def test_a_validation_set_is_seen_as_the_training_set(raw: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=PIXELS[:5] // 2, y=LABELS[:5])
    write_images([tmp_path / "a.npz"], output=tmp_path / "out")
    own = ImageDataset(tmp_path / "out")
    seen = own.normalized_as(opened(raw))
    np.testing.assert_allclose(seen.pixels(torch.arange(5), None)[0], normalised(PIXELS[:5] // 2, raw), atol=2e-6)
    expected = normalised(PIXELS[:5] // 2, tmp_path / "out")
    np.testing.assert_allclose(own.pixels(torch.arange(5), None)[0], expected, atol=2e-6)
    write_images([tmp_path / "a.npz"], output=tmp_path / "gray", grayscale=True)
    with pytest.raises(ValueError, match="gray: has 1 channels, but .*raw has 3; write both with --grayscale"):
        ImageDataset(tmp_path / "gray").normalized_as(opened(raw))


def test_a_channel_of_one_value_becomes_zero(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((3, 4, 4), 77, np.uint8), y=[0, 1, 0])
    write_images([tmp_path / "a.npz"], output=tmp_path / "out", grayscale=True)
    pixels = ImageDataset(tmp_path / "out").pixels(torch.arange(3), None)[0]
    assert pixels.shape == (3, 1, 4, 4) and pixels.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (None, {"size": 0}, "holds image files of any size; give the size"),
        (None, {"size": -1}, "size is -1; set it to 1 or more"),
        ((4, 6), {"size": 0}, "its images are 6 x 4 pixels, not square; give the size"),
    ],
)
def test_sizes_that_are_not_clear(shape: Any, options: Any, message: str, files: Path, tmp_path: Path) -> None:
    folder = files
    if shape:
        np.savez(tmp_path / "a.npz", x=np.zeros((3, *shape), np.uint8), y=[0, 1, 0])
        write_images([tmp_path / "a.npz"], output=tmp_path / "out")
        folder = tmp_path / "out"
        assert ImageDataset(folder, size=4).pixels(torch.arange(3), None)[0].shape == (3, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        ImageDataset(folder, **options)


# -- what opening costs -----------------------------------------------------------------------------------------------


def test_opening_reads_one_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    for module in (builtins, io, os):
        stock = module.open
        monkeypatch.setattr(module, "open", lambda path, *a, _s=stock, **k: read.append(str(path)) or _s(path, *a, **k))
    dataset = opened(copy)
    assert set(read) == {str(copy / "index.json")}
    assert len(dataset) >= N and dataset.sources and dataset.locate(3)
    assert set(read) == {str(copy / "index.json")}


def test_a_billion_images_cost_nothing_to_open(tmp_path: Path) -> None:
    shard = 2**19
    entries = [
        ImageShardEntry(f"shard-{i:05d}.bin", shard, shard * 3 * 64, f"{i:064x}", "web" if i % 2 else "photo")
        for i in range(10**9 // shard)
    ]
    common = {"encoding": "raw", "channels": 3, "height": 8, "width": 8, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    num_images = shard * len(entries)
    write_index(tmp_path, shards=entries, skipped={}, classes=("a", "b"), class_counts=(num_images, 0), **common)
    assert (tmp_path / "index.json").stat().st_size < 250 * len(entries) + 1000
    del entries
    tracemalloc.start()
    dataset = ImageDataset(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == num_images > 0.99e9
    assert kept < 2e6 and peak < 10e6
    last = num_images - 1
    assert dataset.locate(last) == (f"shard-{last // shard:05d}.bin", shard - 1)
    assert len(dataset.sources) == num_images // shard


# -- damage -----------------------------------------------------------------------------------------------------------


def test_every_file_is_missed(copy: Path) -> None:
    dataset = opened(copy)
    dataset.check_sizes()
    dataset.verify_checksums(progress=True)
    for path in sorted(copy.glob("shard-*")):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=f"{path.name}: this file of a shard in index.json is missing; copy the d"):
            dataset.check_sizes()
        path.write_bytes(data[:-1])
        with pytest.raises(
            ValueError, match=rf"{path.name}: has {len(data) - 1} bytes, but index.json says {len(data)}"
        ):
            dataset.check_sizes()
        number = int(path.name[6:11])
        dataset.check_sizes(other for other in range(dataset.num_shards) if other != number)
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        path.write_bytes(flipped)
        dataset.check_sizes()
        with pytest.raises(
            ValueError, match=rf"{path.name.split('.')[0]}.bin: the sha256 over .*: the shard is damaged"
        ):
            dataset.verify_checksums()
        dataset.verify_checksums(other for other in range(dataset.num_shards) if other != number)
        path.write_bytes(data)
    dataset.verify_checksums()


def test_reading_a_truncated_shard_names_it(copy: Path) -> None:
    # The labels are read first.
    for name in ("shard-00002.bin", "shard-00002.labels.bin"):
        os.truncate(copy / name, 3)
        with pytest.raises(ValueError, match=rf"{name}: ends at byte 3, before byte \d+ that is to be read"):
            opened(copy).pixels(torch.tensor([0, 40]), None)


def test_a_damaged_image_or_label_is_named(copy: Path) -> None:
    labels = np.fromfile(copy / "shard-00001.labels.bin", "<i4")
    for wrong in (4, -1):
        labels[5] = wrong
        labels.tofile(copy / "shard-00001.labels.bin")
        with pytest.raises(ValueError, match=r"shard-00001.labels.bin: holds a label outside \[0, 4\): damaged"):
            opened(copy).labels(torch.tensor([24, 25]))
    if "shard-00000.offsets.bin" in os.listdir(copy):
        offsets = np.fromfile(copy / "shard-00000.offsets.bin", "<i8")
        data = bytearray((copy / "shard-00000.bin").read_bytes())
        data[offsets[7] : offsets[7] + 20] = bytes(20)
        (copy / "shard-00000.bin").write_bytes(data)
        with pytest.raises(
            ValueError, match="shard-00000.bin: image 7 of this shard: not an image that Pillow reads .*: damaged"
        ):
            opened(copy).pixels(torch.tensor([6, 7]), None)
        end = int(offsets[-1])
        for wrong, read in ((-5, 7), (end + 1, 6), (0, 6)):
            offsets[7] = wrong
            offsets.tofile(copy / "shard-00000.offsets.bin")
            with pytest.raises(ValueError, match="shard-00000.offsets.bin: has no rising offsets into shard-00000.bin"):
                opened(copy).pixels(torch.tensor([read]), None)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "titan_attent.tokens"}, "format 'titan_attent.tokens' version 1, but expected format"),
        ({"version": 2}, "format 'titan_attent.images' version 2, but expected format .* version 1"),
        ({"classes": list("abce")}, "the index was edited after it was written"),
        ({"mean": [0.5, 0.5, 0.5]}, "the index was edited after it was written"),
        ({"std": [0.5, 0.5]}, "malformed index .*is not one finite number per channel"),
        ({"std": [0.5, 0.5, float("nan")]}, "malformed index .*is not one finite number per channel"),
        ({"channels": 4}, "channels is 4, neither 1 nor 3"),
        ({"encoding": "zip"}, "encoding 'zip' is neither raw nor file"),
        ({"height": 7}, "malformed index"),
        ({"height": "6"}, "malformed index"),
        ({"num_images": 3}, "num_images 3 is not the sum over the shards"),
        ({"class_counts": [1, 2, 3, 4]}, "class_counts do not have"),
        ({"classes": ["a", "b", "c", "c"]}, "the class 'c' appears twice"),
        ({"classes": ["a", "b", "c", 4]}, "the name of a class is 4"),
        ({"shards": []}, "num_images .* is not the sum"),
        ({"shards": [{"file": "../x.bin"}]}, "malformed index"),
        ({"more": 1}, "malformed index"),
        # Of another type, below 0, beyond what a disk holds, nested.
        ({"num_images": 57.0}, "malformed index .num_images is 57.0, of type float: expected a whole number"),
        ({"num_images": True}, "malformed index .num_images is True, of type bool: expected a whole number"),
        ({"num_images": 2**70}, "malformed index .num_images is .* 64 bits"),
        ({"channels": 3.0}, "malformed index .channels is 3.0, of type float: expected a whole number"),
        ({"height": 6.0}, "malformed index .height is 6.0, of type float: expected a whole number"),
        ({"class_counts": [1, 2, 3, -4]}, "malformed index"),
        ({"class_counts": {"a": 1}}, "malformed index .class_counts is of type dict: expected a list"),
        ({"classes": "abcd"}, "malformed index .classes is"),
        ({"shards": 5}, "malformed index .shards is"),
        ({"shards": [5]}, r"malformed index .shards\[0\] is"),
        ({"skipped": {"label": -1}}, "class_counts or skipped have a count below 0"),
        ({"skipped": ["label"]}, "malformed index .skipped is"),
        ({"mean": 0.5}, "malformed index .mean is"),
        ({"mean": [0.5, 0.5, "0.5"]}, r"malformed index .mean\[2\] is"),
        ({"mean": [0.5, 0.5, 1.5]}, "malformed index .*is not one finite number per channel, of pixels in"),
        ({"mean": [0.5, 0.5, -0.1]}, "malformed index .*is not one finite number per channel, of pixels in"),
        ({"std": [0.2, 0.2, 10**400]}, r"malformed index .std\[2\] is"),
        ({"std": [0.2, 0.2, 1e-320]}, "malformed index .*has a value between 0 and 5e-07"),
        ({"std": [0.2, 0.2, 1e30]}, "malformed index .*is not one finite number per channel, of pixels in"),
        ({"fingerprint": 3}, "malformed index .fingerprint is"),
    ],
)
def test_an_index_that_was_edited(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(ValueError, match=f"index.json: .*{message}"):
        opened(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../shard-00000.bin"}, "is not the name of a file in the folder"),
        ({"file": "shard-00000"}, "is not a .bin file"),
        ({"num_images": 0}, "of 0 images"),
        ({"num_images": -20}, "of -20 images"),
        ({"num_images": 20.0}, r"shards\[0\].num_images is 20.0, of type float: expected a whole number"),
        ({"num_bytes": 2**70}, r"shards\[0\].num_bytes is .* 64 bits"),
        ({"num_bytes": "9"}, r"shards\[0\].num_bytes is"),
        ({"sha256": None}, r"shards\[0\].sha256 is"),
        ({"more": 1}, r"shards\[0\]: has the unknown field 'more'"),
        ({"source": "a/b"}, "source 'a/b' of shard"),
        ({"sha256": "0" * 64}, "the index was edited after it was written"),
    ],
)
def test_an_entry_that_was_edited(copy: Path, change: dict[str, Any], message: str) -> None:
    shards = json.loads((copy / "index.json").read_text())["shards"]
    edit(copy, shards=[{**shards[0], **change}, *shards[1:]])
    with pytest.raises(ValueError, match=message):
        opened(copy)


def test_an_index_that_is_nested_deeply(copy: Path) -> None:
    (copy / "index.json").write_text(
        '{"format": "titan_attent.images", "version": 1, "x": ' + "[" * 10**5 + "]" * 10**5 + "}"
    )
    with pytest.raises(ValueError, match="index.json: not a file with a JSON object in it .is nested too deeply"):
        opened(copy)


def test_a_size_that_no_file_has_costs_no_memory(files: Path, tmp_path: Path) -> None:
    """An index and offsets that both claim an exabyte; raw images that claim as much."""
    copy = Path(shutil.copytree(files, tmp_path / "copy"))
    index = read_index(copy)
    fields = {name: getattr(index, name) for name in ("channels", "classes", "class_counts", "mean", "std", "skipped")}
    large = [replace(shard, num_bytes=2**60) for shard in index.shards]
    write_index(copy, shards=large, encoding="file", height=None, width=None, **fields)
    offsets = np.fromfile(copy / "shard-00000.offsets.bin", "<i8")
    offsets[1:] = 2**60
    offsets.tofile(copy / "shard-00000.offsets.bin")
    with pytest.raises(ValueError, match=r"shard-00000.bin: ends at byte \d+, before byte 1152921504606846976"):
        opened(copy).pixels(torch.tensor([0]), None)
    large = [replace(shard, num_bytes=2**50 * 3 * shard.num_images) for shard in index.shards]
    write_index(copy, shards=large, encoding="raw", height=2**25, width=2**25, **fields)
    with pytest.raises(ValueError, match=r"shard-00000.bin: ends at byte \d+, before byte"):
        opened(copy).pixels(torch.tensor([0]), None)
    with pytest.raises(ValueError, match="has .* bytes, but index.json says"):
        opened(copy).check_sizes()


def test_one_duplicate_among_many_names(tmp_path: Path) -> None:
    names = [str(number) for number in range(200_000)]
    with pytest.raises(ValueError, match="the class '7' appears twice"):
        check_classes([*names, "7"])


def test_renamed_sources_are_the_same_data(copy: Path) -> None:
    before = read_index(copy)
    edit(
        copy, shards=[{**entry, "source": "other"} for entry in json.loads((copy / "index.json").read_text())["shards"]]
    )
    assert read_index(copy).fingerprint == before.fingerprint
    assert opened(copy).sources == [("other", 0)]


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="none: not a data set of images, no such folder; correct the path, or make one"
    ):
        ImageDataset(tmp_path / "none")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json: not a file with a JSON object"):
        ImageDataset(tmp_path)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(ValueError, match="format None version None"):
        ImageDataset(tmp_path)


def test_the_hash_is_that_of_the_files_one_after_the_other(copy: Path) -> None:
    for entry in json.loads((copy / "index.json").read_text())["shards"]:
        name = entry["file"].removesuffix(".bin")
        names = [f"{name}{part}.bin" for part in ("", ".labels", ".offsets")]
        data = b"".join((copy / name).read_bytes() for name in names if (copy / name).exists())
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
