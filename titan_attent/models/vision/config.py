"""The TOML section ``[vision]``: settings of the image models. Only ``vit_attent`` and ``mae_attent`` read it.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan_attent.foundations.checks import check_number

if TYPE_CHECKING:
    from titan_attent.data.images import Augmentation

MAX_ALPHA = 1000.0
"""Maximum of ``mixup`` and ``cutmix``."""


@dataclass
class VisionConfig:
    image_size: int = 0
    """Side of the square input of the model, in pixels; 0: the size of the data."""

    patch_size: int = 0
    """Side of a patch, in pixels; must divide image_size. 0: the default of the flavor."""

    crop_scale: float = 1.0
    """
    Random resized crop: smallest share of the area of a training image that a crop has, in (0, 1]. The crop has an
    aspect ratio between 3/4 and 4/3 and is scaled to image_size. 1: no random crop. The random choices of this and the
    following keys depend only on (data.seed, pass, example).
    """

    padding: int = 0
    """Pixels of the mean colour added on each side of a training image, before a random image_size crop."""

    flip: float = 0.0
    """Probability of mirroring a training image, in [0, 1]."""

    jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation of a training image, in [0, 1]."""

    label_smoothing: float = 0.0
    """Share of a label that is spread evenly over all classes, in [0, 1). vit_attent only."""

    drop_path: float = 0.0
    """
    Stochastic depth: probability that a training image skips the last block, in [0, 1). It rises linearly over the
    blocks, from 0 at the first.
    """

    mixup: float = 0.0
    """
    Alpha of mixup: a training image is a weighted mean of two images, with shares from Beta(alpha, alpha). 0: off.
    vit_attent only. The loss of a mixture is recorded for both images, by their shares: docs/guide/vision.md.
    """

    cutmix: float = 0.0
    """Alpha of CutMix: a box of a second image is pasted into the first. With mixup on too, a fair coin chooses."""

    mask_ratio: float = 0.75
    """Share of the patches that mae_attent masks and predicts, in (0, 1)."""

    normalize_patches: bool = True
    """Whether mae_attent predicts patches normalized to mean 0 and variance 1 each, which gives better features."""

    new_head: bool = False
    """
    Whether only the trunk is loaded from checkpoint.initial_load_path. The head, and all other weights that the
    checkpoint lacks, are initialized. For fine-tuning on other classes, and after mae_attent.
    """

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the fix if any value is out of its range."""
        for key in ("image_size", "patch_size"):
            check_number(key, getattr(self, key), at_least=0, whole=True, section="vision")
        for key in ("label_smoothing", "drop_path"):
            check_number(key, getattr(self, key), at_least=0, below=1, section="vision")
        for key in ("mixup", "cutmix"):
            check_number(key, getattr(self, key), at_least=0, at_most=MAX_ALPHA, section="vision")
        check_number("mask_ratio", self.mask_ratio, above=0, below=1, section="vision")
        self.augmentation.validate()

    @property
    def mixes(self) -> bool:
        """Whether training images are mixtures of two."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def augmentation(self) -> "Augmentation":
        """The random changes of a training image, different at each visit."""
        from titan_attent.data.images import Augmentation  # with torch, which a command line needs not

        return Augmentation(crop_scale=self.crop_scale, padding=self.padding, flip=self.flip, jitter=self.jitter)
