"""Example id -> pixels and label. Augmentation depends on (seed, visit key, id) only.

Cost: raw images without augmentation take one read per span of consecutive ids and two passes over their fp32 pixels.
Pillow processes all others image by image in the calling thread, mostly without the interpreter's lock. A batch takes
the memory of its uint8 and its fp32 pixels.
"""

import copy
import os
from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from titan_attent.data.examples import spans_of_sources
from titan_attent.data.images.augment import Augmentation, augmented, draw
from titan_attent.data.images.pictures import decode_bytes, from_array, square, to_array
from titan_attent.data.images.shards import FIX, ImageShards
from titan_attent.foundations.counter_rng import derive_key, stream


class ImageDataset:
    """The examples of an image data set. Picklable; any number of threads may read at once.

    Opening reads index.json only; :meth:`check_sizes` checks the shards.

    Args:
        path: the folder.
        size: side of the square images that are returned; 0: the height of raw images, which must be square.
        augment: how views with a ``visit_key`` differ.
        seed: seed of the augmentation.

    Raises:
        ValueError: as in :class:`~.shards.ImageShards`; ``size`` is missing or below 0; ``augment`` is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int = 0,
        augment: Augmentation = Augmentation(),  # noqa: B008
        seed: int = 0,
    ):
        self.shards = ImageShards(path)
        self.path, self.augment, self.seed = self.shards.path, augment, seed
        index = self.shards.index
        self.fingerprint, self.classes, self.channels = index.fingerprint, index.classes, index.channels
        if size < 0:
            raise ValueError(f"{self.path}: size is {size}; set it to 1 or more, or to 0 for the size of raw images")
        if not size and index.height is None:
            raise ValueError(
                f"{self.path}: holds image files of any size; give the size (side in pixels) to read them at"
            )
        if not size and index.height != index.width:
            raise ValueError(
                f"{self.path}: its images are {index.width} x {index.height} pixels, not square; give the size (side "
                "in pixels) to read them at"
            )
        self.size = size or int(index.height or 0)
        augment.validate()
        if augment.padding >= self.size:
            raise ValueError(
                f"[vision] padding = {augment.padding}: it must be below the size of the images, {self.size} pixels"
            )
        # A channel of one value, whose std is 0, becomes 0.
        self._mean, self._std = np.array(index.mean), np.array([std or 1.0 for std in index.std])

    @property
    def sources(self) -> list[tuple[str, int]]:
        """The name of the data source and the first example id of each span of examples of one source.

        Ids rise from 0, and neighbouring spans have different names, as in
        :attr:`titan_attent.data.text.shards.TokenDataset.sources`. Cost: O(shards), from the index.
        """
        shards = self.shards.index.shards
        firsts = accumulate((shard.num_images for shard in shards), initial=0)  # and the end
        sources = [(shard.source, first) for shard, first in zip(shards, firsts, strict=False)]
        return spans_of_sources(sources, num_examples=len(self))

    def __len__(self) -> int:
        return len(self.shards)

    def locate(self, i: int) -> tuple[str, int]:
        """The shard file of example i, and its index within the shard. IndexError outside [0, N)."""
        return self.shards.locate(i)

    def check_sizes(self, shards: Iterable[int] | None = None) -> None:
        """See :meth:`~.shards.ImageShards.check_sizes`."""
        self.shards.check_sizes(shards)

    def verify_checksums(self, shards: Iterable[int] | None = None, *, progress: bool = False) -> None:
        """See :meth:`~.shards.ImageShards.verify_checksums`."""
        self.shards.verify_checksums(shards, progress=progress)

    @property
    def num_shards(self) -> int:
        return self.shards.num_shards

    def normalized_as(self, other: "ImageDataset") -> "ImageDataset":
        """These images, normalized by the mean and std of ``other``: for a validation set, those of the training set.

        Raises:
            ValueError: one is in colour and the other is gray.
        """
        if self.channels != other.channels:
            raise ValueError(
                f"{self.path}: has {self.channels} channels, but {other.path} has {other.channels}; write both with "
                "--grayscale, or both without"
            )
        changed = copy.copy(self)
        changed._mean, changed._std = other._mean, other._std
        return changed

    def labels(self, ids: Tensor) -> Tensor:
        """Ids int64 [B] -> class indices int64 [B]; IndexError for an id outside [0, N)."""
        return torch.from_numpy(self.shards.labels(self.shards.checked_ids(ids)))

    def thumbnail(self, i: int) -> Image.Image:
        """The fixed view of example i, a picture [S, S] of mode L or RGB; IndexError outside [0, N)."""
        checked_ids = self.shards.checked_ids(torch.tensor([i]))
        return square(next(self._pictures(checked_ids)), self.size)

    def pixels(self, ids: Tensor, visit_key: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """The examples of ``ids``, int64 [B]: pixels, fp32 [B, C, S, S], and labels, int64 [B].

        Pixels are (value / 255 - mean) / std per channel, with mean and std of the index or :meth:`normalized_as`.

        Args:
            visit_key: None for the fixed view: the shorter side resized to S and the centre cropped. Otherwise integers
                that identify a visit, such as (round, pass). Each key gives different views; equal (seed, visit key,
                id) give equal pixels in any batch, thread and process.

        Raises:
            IndexError: an id is outside [0, N).
            ValueError: a shard is truncated or damaged; the message names it.
        """
        checked_ids = self.shards.checked_ids(ids)
        labels = torch.from_numpy(self.shards.labels(checked_ids))
        fixed = visit_key is None or self.augment.is_off
        index = self.shards.index
        if fixed and index.height == index.width == self.size:
            views = self.shards.raw(checked_ids)
        else:
            views = np.empty((len(checked_ids), self.size, self.size, self.channels), dtype=np.uint8)
            mean = tuple(round(255 * value) for value in self._mean.tolist())
            draws = None if fixed else draw(ids, derive_key(stream("images"), self.seed, *(visit_key or ())))
            for row, image in enumerate(self._pictures(checked_ids)):
                if draws is None:
                    view = square(image, self.size)
                else:
                    view = augmented(image, size=self.size, augmentation=self.augment, draws=draws[row], mean=mean)
                views[row] = to_array(view)
        pixels = np.empty((len(checked_ids), self.channels, self.size, self.size), dtype=np.float32)
        scale, shift = (
            (values[:, None, None]).astype(np.float32) for values in (1 / (255 * self._std), -self._mean / self._std)
        )
        np.multiply(views.transpose(0, 3, 1, 2), scale, out=pixels)
        pixels += shift
        return torch.from_numpy(pixels), labels

    def _pictures(self, checked_ids: np.ndarray) -> Iterator[Image.Image]:
        """The stored pictures of checked ids, in order."""
        if self.shards.index.encoding == "raw":
            yield from (from_array(pixels, channels=self.channels) for pixels in self.shards.raw(checked_ids))
            return
        for i, data in zip(checked_ids.tolist(), self.shards.file_bytes(checked_ids), strict=True):
            try:
                yield decode_bytes(data, channels=self.channels)[0]
            except ValueError as error:
                file, slot = self.locate(i)
                raise ValueError(f"{self.path / file}: image {slot} of this shard: {error}: damaged; {FIX}") from error
