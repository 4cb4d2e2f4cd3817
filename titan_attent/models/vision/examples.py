"""Example id -> an image and what a model is asked about it: the two kinds of examples of images (data/examples.py).

What is random in them is a hash of (seed, visit key, example id), so that any number of ranks, and a resumed run, see
the same.
"""

import math
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.images import ImageDataset
from titan_attent.data.io.reader import ReadBatch
from titan_attent.foundations.counter_rng import derive_key, hash_ids, stream
from titan_attent.models.vision.mae import MAEArgs, keyed_keep, keyed_masks, patch_targets
from titan_attent.models.vision.mixing import keyed_draws, mix
from titan_attent.models.vision.vit import ViTArgs

_DEPTH, _MASK, _PARTNER, _MIX = 1, 2, 3, 4
"""Of the keys within stream("images"), behind the augmentation's own."""


class ImageExamples:
    """What the two have in common.

    Args:
        images: the data set.
        args: of the model.
        seed: of what is random.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, images: ImageDataset, args: ViTArgs, *, seed: int):
        self.images = self.stored = images
        self.args, self.seed = args, seed
        self.seq_len: int = images.size

    @property
    def tokens_per_example(self) -> int:
        """Patches."""
        return self.args.num_patches

    @property
    def sources(self) -> list[tuple[str, int]]:
        return self.images.sources

    def __len__(self) -> int:
        return len(self.images)

    def location(self, i: int) -> dict[str, Any]:
        """Where image i stands: its shard, its number there, and its label."""
        shard, number = self.images.locate(i)
        label = int(self.images.labels(torch.tensor([i])))
        return {"shard": shard, "image": number, "label": self.images.classes[label]}

    def _key(self, purpose: int, visit_key: tuple[int, ...] | None) -> int:
        return derive_key(stream("images"), purpose, self.seed, *(visit_key or ()))

    def _depth(self, ids: Tensor, visit_key: tuple[int, ...] | None) -> dict[str, Tensor]:
        """Which blocks an image goes through, where it is trained."""
        if visit_key is None or not self.args.drop_path:
            return {}
        return {"keep": keyed_keep(ids, self._key(_DEPTH, visit_key), self.args.drop_rates)}


class ClassExamples(ImageExamples):
    """Images and their class.

    A batch: ``{"input": fp32 [B, C, S, S]}``, and ``keep`` fp32 [B, blocks] in training with stochastic depth; labels
    int64 [B, 1]. Mixed with another image in training, it has that one's ``other_id`` and ``other_label``, int64 [B],
    and its own ``share``, fp32 [B]. Any image may be the other one, whether it is taught or not.

    Args:
        mixup, cutmix: alphas of mixing.py; 0 for none.
    """

    def __init__(self, images: ImageDataset, args: ViTArgs, *, seed: int, mixup: float = 0.0, cutmix: float = 0.0):
        super().__init__(images, args, seed=seed)
        self.mixup, self.cutmix = mixup, cutmix
        self.columns = ("other_label", "share", "other_id") if mixup or cutmix else ()

    @property
    def chance_loss(self) -> float:
        """ln C."""
        return math.log(len(self.images.classes))

    def read(self, ids: Tensor, visit_key: tuple[int, ...] | None = None) -> ReadBatch:
        pixels, labels = self.images.pixels(ids, visit_key)
        inputs = {"input": pixels} | self._depth(ids, visit_key)
        if visit_key is not None and self.columns:
            others = hash_ids(ids, self._key(_PARTNER, visit_key)).remainder(len(self))
            other_pixels, other_labels = self.images.pixels(others, visit_key)
            draws = keyed_draws(ids, self._key(_MIX, visit_key), mixup_alpha=self.mixup, cutmix_alpha=self.cutmix)
            inputs["input"], shares = mix(pixels, labels, other_pixels, other_labels, draws)
            inputs |= {"other_label": other_labels, "share": shares, "other_id": others}
        return inputs, labels[:, None]


class PatchExamples(ImageExamples):
    """Images with most of their patches masked, to be predicted from the others.

    A batch: ``{"input": fp32 [B, C, S, S], "visible": int64 [B, V], "masked": int64 [B, M]}``, numbers of patches;
    labels fp32 [B, M, D], the pixels of the masked ones. Without a visit key an example always has the same masks.

    Args:
        normalize: give each masked patch mean 0 and variance 1.
    """

    args: MAEArgs
    chance_loss = 1.0
    """The variance of the pixels, of each patch or of all images: what their mean costs."""

    def __init__(self, images: ImageDataset, args: MAEArgs, *, seed: int, normalize: bool):
        super().__init__(images, args, seed=seed)
        self.normalize = normalize

    def read(self, ids: Tensor, visit_key: tuple[int, ...] | None = None) -> ReadBatch:
        args = self.args
        pixels, _ = self.images.pixels(ids, visit_key)
        # Validation looks at the same masks whatever the seed of the run.
        key = self._key(_MASK, visit_key) if visit_key is not None else derive_key(stream("images"), _MASK)
        visible, masked = keyed_masks(ids, key, args.num_patches, args.num_masked)
        labels = patch_targets(pixels, masked, args.patch_size, self.normalize)
        return {"input": pixels, "visible": visible, "masked": masked, **self._depth(ids, visit_key)}, labels
