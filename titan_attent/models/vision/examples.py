"""Example id -> inputs and labels of an image model, for both models (the interface: data/examples.py).

All random choices are hashes of (seed, visit key, example id), so they do not depend on the number of ranks and are the
same in a resumed run.
"""

import math
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.examples import ScoredData
from titan_attent.data.images import ImageDataset
from titan_attent.data.io.reader import ReadBatch
from titan_attent.foundations.counter_rng import derive_key, hash_ids, stream
from titan_attent.models.vision.mae import MAEArgs, keyed_keep, keyed_masks, patch_targets
from titan_attent.models.vision.mixing import keyed_draws, mix
from titan_attent.models.vision.vit import ViTArgs

_DEPTH, _MASK, _PARTNER, _MIX = 1, 2, 3, 4
"""The purposes of keys within stream("images"), besides the augmentation."""


class ImageExamples:
    """The common part of the examples of both models.

    Args:
        images: the data set.
        args: sizes of the model.
        seed: seed of all random choices.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, images: ImageDataset, args: ViTArgs, *, seed: int):
        self.images = self.stored = images
        self.args, self.seed = args, seed
        self.seq_len: int = images.size

    @property
    def tokens_per_example(self) -> int:
        """The number of patches, the tokens of an image."""
        return self.args.num_patches

    @property
    def num_rows(self) -> int:
        return len(self)

    @property
    def scored(self) -> ScoredData:
        return ScoredData(self.images.fingerprint, self.seq_len, len(self))

    @property
    def sources(self) -> list[tuple[str, int]]:
        return self.images.sources

    def __len__(self) -> int:
        return len(self.images)

    def location(self, i: int) -> dict[str, Any]:
        """The shard of image i, its index within the shard, and the name of its class."""
        shard, slot = self.images.locate(i)
        label = int(self.images.labels(torch.tensor([i])))
        return {"shard": shard, "image": slot, "label": self.images.classes[label]}

    def _key(self, purpose: int, visit_key: tuple[int, ...] | None) -> int:
        return derive_key(stream("images"), purpose, self.seed, *(visit_key or ()))

    def _depth(self, ids: Tensor, visit_key: tuple[int, ...] | None) -> dict[str, Tensor]:
        """The input ``keep`` of stochastic depth; empty if it is off or for validation."""
        if visit_key is None or not self.args.drop_path:
            return {}
        return {"keep": keyed_keep(ids, self._key(_DEPTH, visit_key), self.args.drop_rates)}


class ClassExamples(ImageExamples):
    """Images with their classes.

    A batch has ``input`` fp32 [B, C, S, S], and ``keep`` fp32 [B, blocks] in training with stochastic depth. Its labels
    are int64 [B, 1]. With mixing in training it also has ``other_id`` and ``other_label`` of the second image, int64
    [B], and the ``share`` of the first, fp32 [B]. The second image may be any of the data set, selected or not.

    Args:
        mixup, cutmix: alphas of mixing.py; 0 turns them off.
    """

    def __init__(self, images: ImageDataset, args: ViTArgs, *, seed: int, mixup: float = 0.0, cutmix: float = 0.0):
        super().__init__(images, args, seed=seed)
        self.mixup, self.cutmix = mixup, cutmix
        self.columns = ("other_label", "share", "other_id") if mixup or cutmix else ()

    @property
    def chance_loss(self) -> float:
        """The loss of equal probabilities: ln of the number of classes."""
        return math.log(len(self.images.classes))

    def read(self, ids: Tensor, visit_key: tuple[int, ...] | None = None) -> ReadBatch:
        pixels, labels = self.images.pixels(ids, visit_key)
        inputs = {"input": pixels} | self._depth(ids, visit_key)
        if visit_key is not None and self.columns:
            other_ids = hash_ids(ids, self._key(_PARTNER, visit_key)).remainder(len(self))
            other_pixels, other_labels = self.images.pixels(other_ids, visit_key)
            draws = keyed_draws(ids, self._key(_MIX, visit_key), mixup_alpha=self.mixup, cutmix_alpha=self.cutmix)
            inputs["input"], shares = mix(pixels, labels, other_pixels, other_labels, draws)
            inputs |= {"other_label": other_labels, "share": shares, "other_id": other_ids}
        return inputs, labels[:, None]


class PatchExamples(ImageExamples):
    """Images with masked patches, which are predicted from the visible ones.

    A batch has ``input`` fp32 [B, C, S, S] and the indices of patches ``visible`` int64 [B, V] and ``masked`` int64
    [B, M]. Its labels are the pixels of the masked patches, fp32 [B, M, D]. Without a visit key the masks of an example
    are always the same.

    Args:
        normalize: normalize each masked patch to mean 0 and variance 1.
    """

    args: MAEArgs
    chance_loss = 1.0
    """The loss of predicting the mean: the variance of the normalized pixels, of each patch or of all images."""

    def __init__(self, images: ImageDataset, args: MAEArgs, *, seed: int, normalize: bool):
        super().__init__(images, args, seed=seed)
        self.normalize = normalize

    def read(self, ids: Tensor, visit_key: tuple[int, ...] | None = None) -> ReadBatch:
        args = self.args
        pixels, _ = self.images.pixels(ids, visit_key)
        # Validation uses the same masks for every seed of the run.
        key = self._key(_MASK, visit_key) if visit_key is not None else derive_key(stream("images"), _MASK)
        visible, masked = keyed_masks(ids, key, args.num_patches, args.num_masked)
        labels = patch_targets(pixels, masked, args.patch_size, self.normalize)
        return {"input": pixels, "visible": visible, "masked": masked, **self._depth(ids, visit_key)}, labels
