"""The TOML section ``[vision]``: what the models of images are given. Read by ``vit_attent`` and ``mae_attent`` only.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass

from titan_attent.data.images import Augmentation
from titan_attent.foundations.checks import check_number
from titan_attent.models.vision.mixing import LARGEST_ALPHA


@dataclass
class VisionConfig:
    image_size: int = 0
    """Side of the square, in pixels, that the model sees; 0 for that of the data."""

    patch_size: int = 0
    """Side of a patch, in pixels; it divides image_size. 0 for the flavor's."""

    crop_scale: float = 1.0
    """
    A training image is a random part of at least this share of the area, of an aspect between 3/4 and 4/3, scaled to
    image_size, in (0, 1]; 1 for none. As all that follows, it depends on (data.seed, pass, example) alone.
    """

    padding: int = 0
    """A training image is padded by so many pixels of the mean colour on each side, and image_size of it cut out."""

    flip: float = 0.0
    """Share of the training images that are mirrored, in [0, 1]."""

    jitter: float = 0.0
    """Brightness, contrast and saturation of a training image change by up to this share, in [0, 1)."""

    label_smoothing: float = 0.0
    """Share of a label that goes to all classes alike, in [0, 1). vit_attent only."""

    drop_path: float = 0.0
    """
    Stochastic depth: the share of training images for which the last block is left out, in [0, 1); it rises linearly
    from 0 at the first one.
    """

    mixup: float = 0.0
    """
    Alpha of mixup: a training image is a weighted mean of two, shares drawn from Beta(alpha, alpha). 0 for none.
    vit_attent only. The loss of a mixture is recorded under both images, by their shares: docs/guide/vision.md.
    """

    cutmix: float = 0.0
    """Alpha of CutMix: a box of a second image in the first. With mixup a fair coin decides for each image."""

    mask_ratio: float = 0.75
    """Share of the patches that mae_attent has to predict, in (0, 1)."""

    normalize_patches: bool = True
    """Whether mae_attent predicts patches of mean 0 and variance 1, each, which is better for what it learns."""

    new_head: bool = False
    """
    Whether checkpoint.initial_load_path gives the trunk only: the head (and what else the checkpoint has not) starts
    anew. For fine-tuning on other classes, and after mae_attent.
    """

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the mend if any value is out of its range."""
        for key in ("image_size", "patch_size"):
            check_number(key, getattr(self, key), at_least=0, whole=True, section="vision")
        for key in ("label_smoothing", "drop_path"):
            check_number(key, getattr(self, key), at_least=0, below=1, section="vision")
        for key in ("mixup", "cutmix"):
            check_number(key, getattr(self, key), at_least=0, at_most=LARGEST_ALPHA, section="vision")
        check_number("mask_ratio", self.mask_ratio, above=0, below=1, section="vision")
        self.augmentation.validate()

    @property
    def mixes(self) -> bool:
        """Whether training images are mixtures of two."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def augmentation(self) -> Augmentation:
        """What differs from visit to visit."""
        return Augmentation(crop_scale=self.crop_scale, padding=self.padding, flip=self.flip, jitter=self.jitter)
