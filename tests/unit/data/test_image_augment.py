"""Augmentation against plain Pillow, and as a function of (seed, visit key, id) alone."""

import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from titan_attent.data.images import Augmentation, ImageDataset, write_images
from titan_attent.data.images.augment import NUM_DRAWS, crop_box, draw
from titan_attent.foundations.counter_rng import derive_key, stream, uniform

N, SIZE = 40, 10
ALL = Augmentation(crop_scale=0.4, padding=2, flip=0.5, jitter=0.3)
RNG = np.random.default_rng(2)
IDS = torch.arange(N)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without hard edges, as photographs are."""
    small = Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [smooth(*RNG.integers(12, 40, 2).tolist()) for _ in range(N)]


@pytest.fixture(scope="module", params=["colour", "gray", "raw"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: list[np.ndarray]
) -> Path:
    root = tmp_path_factory.mktemp("augment")
    for i, pixels in enumerate(pictures):
        path = root / "in" / "ab"[i * 2 // N] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    options: dict[str, Any] = {"size": 14} if request.param == "raw" else {"encoding": "file"}
    write_images([root / "in"], output=root / "out", grayscale=request.param == "gray", shard_images=11, **options)
    return root / "out"


def opened(folder: Path, augment: Augmentation = ALL, seed: int = 5) -> ImageDataset:
    return ImageDataset(folder, size=SIZE, augment=augment, seed=seed)


# -- the same for every split -----------------------------------------------------------------------------------------


def test_pixels_depend_on_seed_turn_and_id_alone(folder: Path) -> None:
    dataset = opened(folder)
    whole, labels = dataset.pixels(IDS, (3, 1))
    assert labels.tolist() == [i * 2 // N for i in range(N)]
    order = torch.from_numpy(RNG.permutation(N))
    for split in (1, 7, N):
        parts = [dataset.pixels(ids, (3, 1)) for ids in order.split(split)]
        assert torch.equal(torch.cat([part for part, _ in parts]), whole[order])
        assert torch.equal(torch.cat([part for _, part in parts]), labels[order])
    again = pickle.loads(pickle.dumps(dataset))
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda ids: again.pixels(ids, (3, 1)), order.split(3)))
    assert torch.equal(torch.cat([part for part, _ in parts]), whole[order])
    assert torch.equal(dataset.pixels(torch.tensor([4, 4]), (3, 1))[0], whole[[4, 4]])


def test_another_turn_or_seed_gives_other_views(folder: Path) -> None:
    dataset = opened(folder)
    views = [
        dataset.pixels(IDS, (3, 1))[0],
        dataset.pixels(IDS, (1, 3))[0],
        dataset.pixels(IDS, (3, 2))[0],
        dataset.pixels(IDS, (3,))[0],
        opened(folder, seed=6).pixels(IDS, (3, 1))[0],
        dataset.pixels(IDS, None)[0],
    ]
    for i, one in enumerate(views):
        for other in views[:i]:
            assert (one != other).flatten(1).any(dim=1).float().mean() > 0.9


def test_without_a_turn_the_view_is_fixed(folder: Path, pictures: list[np.ndarray]) -> None:
    dataset, index = opened(folder), opened(folder).shards.index
    pixels, _ = dataset.pixels(IDS, None)
    assert torch.equal(pixels, opened(folder, Augmentation()).pixels(IDS, (1,))[0])
    for i in range(N):
        view = ImageOps.fit(stored(folder, pictures, i), (SIZE, SIZE), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(np.asarray(view), np.asarray(dataset.thumbnail(i)))
        np.testing.assert_allclose(pixels[i], normalised(view, index), atol=3e-6)


def stored(folder: Path, pictures: list[np.ndarray], i: int) -> Image.Image:
    """Picture i as the data set holds it."""
    index = ImageDataset(folder, size=SIZE).shards.index
    image = Image.fromarray(pictures[i]).convert("RGB" if index.channels == 3 else "L")
    return image if index.encoding == "file" else ImageOps.fit(image, (14, 14), Image.Resampling.BILINEAR)


def normalised(view: Image.Image, index: Any) -> np.ndarray:
    pixels = np.asarray(view).reshape(SIZE, SIZE, index.channels) / 255
    return ((pixels - index.mean) / index.std).transpose(2, 0, 1)


# -- against plain Pillow ---------------------------------------------------------------------------------------------


def plain(image: Image.Image, u: list[float], augment: Augmentation, mean: tuple[float, ...]) -> Image.Image:
    """The steps one by one; u are area, ratio, x, y, flip, x and y of the padding, brightness, contrast, saturation."""
    width, height = image.size
    if augment.crop_scale == 1:
        image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)
    else:
        area = (augment.crop_scale + (1 - augment.crop_scale) * u[0]) * width * height
        low, high = max(0.75, area / height**2), min(4 / 3, width**2 / area)
        if low > high:
            w, h = (height * 4 / 3, height) if width > height else (width, width * 4 / 3)
        else:
            ratio = low ** (1 - u[1]) * high ** u[1]
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        x, y = (width - w) * u[2], (height - h) * u[3]
        box = (max(0, x), max(0, y), min(width, x + w), min(height, y + h))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    if u[4] < augment.flip:
        image = ImageOps.mirror(image)
    if p := augment.padding:
        colour = tuple(round(255 * value) for value in mean)
        image = ImageOps.expand(image, p, fill=colour if len(colour) == 3 else colour[0])
        x, y = (math.floor((2 * p + 1) * value) for value in u[5:7])
        image = image.crop((x, y, x + SIZE, y + SIZE))
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for enhancer, value in zip(enhancers[: len(mean) + 1], u[7:], strict=False):
        if augment.jitter:
            image = enhancer(image).enhance(1 - augment.jitter + 2 * augment.jitter * value)
    return image


@pytest.mark.parametrize(
    "augment",
    [
        Augmentation(crop_scale=0.2),
        Augmentation(padding=3),
        Augmentation(flip=0.5),
        Augmentation(jitter=0.4),
        ALL,
    ],
    ids=["crop", "padding", "flip", "jitter", "all"],
)
def test_a_view_is_plain_pillow(folder: Path, pictures: list[np.ndarray], augment: Augmentation) -> None:
    dataset = opened(folder, augment)
    index = dataset.shards.index
    key = derive_key(stream("images"), 5, 2, 9)
    u = torch.stack([uniform(IDS, derive_key(key, number)) for number in range(10)], dim=1).tolist()
    pixels, _ = dataset.pixels(IDS, (2, 9))
    for i in range(N):
        view = plain(stored(folder, pictures, i), u[i], augment, index.mean)
        # A last digit of a box may move a pixel by one.
        np.testing.assert_allclose(pixels[i], normalised(view, index), atol=3e-6 + 1.01 / 255 / min(index.std))
        assert np.mean(np.abs(pixels[i].numpy() - normalised(view, index)) > 1e-4) < 0.02


# -- distributions ----------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_independent() -> None:
    draws = draw(torch.arange(20_000), 7)
    assert draws.shape == (20_000, NUM_DRAWS) and draws.min() > 0 and draws.max() < 1
    assert np.all(abs(draws.mean(axis=0) - 0.5) < 5 / math.sqrt(12 * 20_000))
    off_diagonal = np.corrcoef(draws.T) - np.eye(NUM_DRAWS)
    assert abs(off_diagonal).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("flip", [0.0, 0.25, 1.0])
def test_the_rate_of_flips(tmp_path: Path, flip: float) -> None:
    image = np.zeros((4, 4), np.uint8)
    image[:, 0] = 255
    np.savez(tmp_path / "a.npz", x=np.stack([image] * 2000), y=np.zeros(2000, int))
    write_images([tmp_path / "a.npz"], output=tmp_path / "out", grayscale=True)
    dataset = ImageDataset(tmp_path / "out", augment=Augmentation(flip=flip))
    pixels, _ = dataset.pixels(torch.arange(2000), (0,))
    flipped = pixels[:, 0, 0, 3] > 0
    assert torch.equal(flipped, pixels[:, 0, 0, 0] < 0)
    assert abs(flipped.float().mean() - flip) <= 4 * math.sqrt(flip * (1 - flip) / 2000)


@pytest.mark.parametrize("size", [(32, 32), (40, 30), (30, 40), (31, 29)])
@pytest.mark.parametrize("scale", [0.08, 0.5, 0.95])
def test_crops_stay_inside_and_within_their_bounds(size: tuple[int, int], scale: float) -> None:
    width, height = size
    boxes = np.array([crop_box(*size, scale=scale, draws=row) for row in draw(torch.arange(3000), 3)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    shares = (right - left) * (bottom - top) / (width * height)
    assert shares.min() >= scale - 1e-9 and shares.max() <= 1 + 1e-9
    assert abs(shares.mean() - (1 + scale) / 2) < 5 * (1 - scale) / math.sqrt(12 * 3000)
    ratios = (right - left) / (bottom - top)
    assert ratios.min() >= 0.75 - 1e-9 and ratios.max() <= 4 / 3 + 1e-9
    if size == (32, 32) and scale == 0.08:
        small = np.log(ratios[shares < 0.5])  # where every ratio has room
        assert abs(small.mean()) < 5 * small.std() / math.sqrt(len(small))
        assert abs(small.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
        assert abs((left / (width - right + left)).mean() - 0.5) < 0.03


@pytest.mark.parametrize(("size", "sides"), [((100, 20), (20 * 4 / 3, 20)), ((20, 100), (20, 20 * 4 / 3))])
def test_a_picture_too_long_for_its_share(size: tuple[int, int], sides: tuple[float, float]) -> None:
    for row in draw(torch.arange(100), 3):
        left, top, right, bottom = crop_box(*size, scale=0.9, draws=row)
        assert (right - left, bottom - top) == pytest.approx(sides)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_padding_moves_the_picture_over_all_places(tmp_path: Path) -> None:
    image = np.zeros((5, 5), np.uint8)
    image[2, 2] = 250
    np.savez(tmp_path / "a.npz", x=np.stack([image] * 900), y=np.zeros(900, int))
    write_images([tmp_path / "a.npz"], output=tmp_path / "out", grayscale=True)
    dataset = ImageDataset(tmp_path / "out", augment=Augmentation(padding=1))
    pixels, _ = dataset.pixels(torch.arange(900), (0,))
    places = pixels.flatten(1).argmax(dim=1)
    counts = torch.bincount(places, minlength=25).view(5, 5)
    assert counts[1:4, 1:4].sum() == 900 and counts[1:4, 1:4].min() > 60
    moved = pixels[places == 18, 0]  # to the right and down: the first row and column are padding, of the mean colour
    assert moved[:, 0].abs().max() < 0.02 and moved[:, :, 0].abs().max() < 0.02 and moved[:, 1:, 1:].abs().min() > 0.1


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("crop_scale", value) for value in (0, -1, 1.5, math.nan, "1")),
        *(("padding", value) for value in (-1, 0.5, True)),
        *(("flip", value) for value in (-0.1, 1.1, math.inf)),
        *(("jitter", value) for value in (-0.1, 1.1)),
    ],
)
def test_values_that_make_no_sense(folder: Path, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"[vision] {key} = {value!r}: it must be")):
        Augmentation(**{key: value}).validate()
    with pytest.raises(ValueError, match=key):
        opened(folder, Augmentation(**{key: value}))


def test_padding_leaves_some_of_the_picture(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"\[vision\] padding = 10: it must be below the size of the images, 10 pixels"
    ):
        opened(folder, Augmentation(padding=SIZE))


def test_all_is_off_by_default() -> None:
    Augmentation().validate()
    assert Augmentation().is_off and not ALL.is_off and not Augmentation(flip=0.1).is_off
