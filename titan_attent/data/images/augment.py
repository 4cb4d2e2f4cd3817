"""Augmentation: random views of a picture, each a pure function of (key, example id).

Order: crop, flip, padding, brightness, contrast, saturation. Pillow resamples: near the edge of a crop its antialiasing
reads a few pixels of the picture outside of the crop.

Cost: 10 hashes per example for the draws; all other time is Pillow's, see docs/reference/image_writer.md.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from titan_attent.data.images.pictures import square
from titan_attent.foundations.checks import check_number
from titan_attent.foundations.counter_rng import derive_key, uniform

# The draws of an example. Each has its own key.
AREA, RATIO, CROP_X, CROP_Y, FLIP, PAD_X, PAD_Y, BRIGHTNESS, CONTRAST, SATURATION = range(10)
NUM_DRAWS = 10
RATIOS = 3 / 4, 4 / 3
"""Bounds of width / height of a crop."""


@dataclass(frozen=True)
class Augmentation:
    """How views of one example may differ. Everything is off by default."""

    crop_scale: float = 1.0
    """Random resized crop: the smallest share of the picture's area that a crop may have; 1 crops the centre square."""

    padding: int = 0
    """Pixels of the mean colour added on each side of the view, from which a random window of its size is cropped."""

    flip: float = 0.0
    """Probability of a left-right flip."""

    jitter: float = 0.0
    """Brightness, contrast and (in colour) saturation are each scaled by a factor from 1 - jitter to 1 + jitter."""

    @property
    def is_off(self) -> bool:
        return self == Augmentation()

    def validate(self) -> None:
        """Raise a ValueError that names the key if a value is out of its range."""
        check_number("crop_scale", self.crop_scale, above=0, at_most=1, section="vision")
        check_number("padding", self.padding, at_least=0, whole=True, section="vision")
        check_number("flip", self.flip, at_least=0, at_most=1, section="vision")
        check_number("jitter", self.jitter, at_least=0, at_most=1, section="vision")


def draw(ids: Tensor, key: int) -> np.ndarray:
    """Ids int64 [B] -> draws float64 [B, NUM_DRAWS] in (0, 1). A row depends on the key and its id only."""
    return np.stack([uniform(ids, derive_key(key, number)).numpy() for number in range(NUM_DRAWS)], axis=1)


def crop_box(width: int, height: int, *, scale: float, draws: np.ndarray) -> tuple[float, float, float, float]:
    """A random crop of at least ``scale`` of the area, with width / height log-uniform in the ``RATIOS`` that fit.

    If no ratio fits, the result is the largest crop of the nearest ratio; its area may be smaller.

    Returns:
        left, top, right, bottom in pixels, within the picture.
    """
    share = scale + (1 - scale) * draws[AREA]
    # The ratios at which a crop of this share is neither wider nor higher than the picture.
    min_ratio, max_ratio = max(RATIOS[0], share * width / height), min(RATIOS[1], width / (share * height))
    if min_ratio <= max_ratio:
        ratio = math.exp(math.log(min_ratio) + (math.log(max_ratio) - math.log(min_ratio)) * draws[RATIO])
        crop_width = min(width, math.sqrt(share * width * height * ratio))
        crop_height = min(height, crop_width / ratio)
    elif width > height:
        crop_width, crop_height = height * RATIOS[1], height
    else:
        crop_width, crop_height = width, width / RATIOS[0]
    left, top = (width - crop_width) * draws[CROP_X], (height - crop_height) * draws[CROP_Y]
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


def augmented(
    image: Image.Image, *, size: int, augmentation: Augmentation, draws: np.ndarray, mean: tuple[int, ...]
) -> Image.Image:
    """The view [size, size] of ``image`` (mode L or RGB) for ``draws`` [NUM_DRAWS]; padding has colour ``mean``."""
    if augmentation.crop_scale < 1:
        box = crop_box(*image.size, scale=augmentation.crop_scale, draws=draws)
        view = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    else:
        view = square(image, size)
    if draws[FLIP] < augmentation.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if padding := augmentation.padding:
        num_offsets = 2 * padding + 1
        offset = padding - int(num_offsets * draws[PAD_X]), padding - int(num_offsets * draws[PAD_Y])
        window = Image.new(view.mode, view.size, mean if len(mean) > 1 else mean[0])
        window.paste(view, offset)
        view = window
    if jitter := augmentation.jitter:
        factors = 1 + jitter * (2 * draws - 1)
        view = ImageEnhance.Brightness(view).enhance(factors[BRIGHTNESS])
        view = ImageEnhance.Contrast(view).enhance(factors[CONTRAST])
        if view.mode == "RGB":
            view = ImageEnhance.Color(view).enhance(factors[SATURATION])
    return view
