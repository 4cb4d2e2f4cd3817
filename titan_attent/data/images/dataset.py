"""Example id -> pixels and label, augmented by (seed, visit key, id) alone.

Cost: raw images that are not augmented are one read a stretch of ids and two passes over their fp32 pixels; anything
else is Pillow's work image by image, in the thread that asks, mostly without the interpreter's lock. In memory a batch
is its uint8 and its fp32 pixels.
"""

import copy
import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from titan_attent.data.images.augment import Augmentation, augmented, draw
from titan_attent.data.images.pictures import decode, from_array, square, to_array
from titan_attent.data.images.shards import MEND, ImageShards
from titan_attent.foundations.counter_rng import derive_key, stream


class ImageDataset:
    """The examples of an image data set. Picklable; any number of threads may read at once.

    Opening reads index.json alone: :meth:`check_sizes` looks at the shards.

    Args:
        path: the folder.
        size: side of the square that comes out; 0: the height of raw images, which must be square.
        augment: how views with a ``visit_key`` differ.
        seed: of the augmentation.

    Raises:
        ValueError: as :class:`~.shards.ImageShards`; a ``size`` that is missing or below 1; a value of ``augment``.
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
            raise ValueError(f"{self.path}: size is {size}; set it to 1 or more, or to 0 for that of raw images")
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
        """Stretches of examples of one data source: its name and the first example id, from 0 on and rising.

        No two neighbours have the same name. Computed from the index, O(shards); read it as
        :attr:`titan_attent.data.text.shards.TokenDataset.sources`.
        """
        stretches: list[tuple[str, int]] = []
        first = 0
        for shard in self.shards.index.shards:
            if not stretches or stretches[-1][0] != shard.source:
                stretches.append((shard.source, first))
            first += shard.num_images
        return stretches

    def __len__(self) -> int:
        return len(self.shards)

    def locate(self, i: int) -> tuple[str, int]:
        """Where example i stands: its shard file, and its number in it. IndexError outside [0, N)."""
        return self.shards.locate(i)

    def check_sizes(self, shards: Iterable[int] | None = None) -> None:
        """As :meth:`~.shards.ImageShards.check_sizes`."""
        self.shards.check_sizes(shards)

    def verify_checksums(self, shards: Iterable[int] | None = None, *, progress: bool = False) -> None:
        """As :meth:`~.shards.ImageShards.verify_checksums`."""
        self.shards.verify_checksums(shards, progress=progress)

    @property
    def num_shards(self) -> int:
        return self.shards.num_shards

    def normalized_as(self, other: "ImageDataset") -> "ImageDataset":
        """These images with the mean and std of ``other``: a validation set as the training set is seen.

        Raises:
            ValueError: one has colours and the other is gray.
        """
        if self.channels != other.channels:
            raise ValueError(
                f"{self.path}: has {self.channels} channels where {other.path} has {other.channels}; write both with "
                "--grayscale, or both without"
            )
        changed = copy.copy(self)
        changed._mean, changed._std = other._mean, other._std
        return changed

    def labels(self, ids: Tensor) -> Tensor:
        """int64 [B] -> int64 [B]; IndexError outside [0, N)."""
        return torch.from_numpy(self.shards.labels(self.shards.numbers(ids)))

    def thumbnail(self, i: int) -> Image.Image:
        """Example i as the fixed view, a picture [S, S] of mode L or RGB; IndexError outside [0, N)."""
        numbers = self.shards.numbers(torch.tensor([i]))
        return square(next(self._pictures(numbers)), self.size)

    def pixels(self, ids: Tensor, visit_key: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """The examples of ``ids``, int64 [B]: pixels, fp32 [B, C, S, S], and labels, int64 [B].

        Pixels are (value / 255 - mean) / std, channel by channel, those of the index unless :meth:`normalized_as`.

        Args:
            visit_key: None for the fixed view: the shorter side resized to S and the centre cut. Otherwise integers
                that name one visit of the examples in training, such as (round, pass): each key gives other views.
                Equal (seed, visit key, id) give equal pixels in any batch, thread and process.

        Raises:
            IndexError: an id is outside [0, N).
            ValueError: a shard was truncated or is damaged; names it.
        """
        numbers = self.shards.numbers(ids)
        labels = torch.from_numpy(self.shards.labels(numbers))
        fixed = visit_key is None or self.augment.is_off
        index = self.shards.index
        if fixed and index.height == index.width == self.size:
            views = self.shards.raw(numbers)
        else:
            views = np.empty((len(numbers), self.size, self.size, self.channels), dtype=np.uint8)
            mean = tuple(round(255 * value) for value in self._mean.tolist())
            draws = None if fixed else draw(ids, derive_key(stream("images"), self.seed, *(visit_key or ())))
            for row, image in enumerate(self._pictures(numbers)):
                if draws is None:
                    view = square(image, self.size)
                else:
                    view = augmented(image, size=self.size, augmentation=self.augment, draws=draws[row], mean=mean)
                views[row] = to_array(view)
        pixels = np.empty((len(numbers), self.channels, self.size, self.size), dtype=np.float32)
        scale, shift = (
            (values[:, None, None]).astype(np.float32) for values in (1 / (255 * self._std), -self._mean / self._std)
        )
        np.multiply(views.transpose(0, 3, 1, 2), scale, out=pixels)
        pixels += shift
        return torch.from_numpy(pixels), labels

    def _pictures(self, numbers: np.ndarray) -> Iterator[Image.Image]:
        """The stored pictures of checked ids, one after the other."""
        if self.shards.index.encoding == "raw":
            yield from (from_array(pixels, channels=self.channels) for pixels in self.shards.raw(numbers))
            return
        for i, data in zip(numbers.tolist(), self.shards.file_bytes(numbers), strict=True):
            try:
                yield decode(data, channels=self.channels)[0]
            except ValueError as error:
                file, number = self.locate(i)
                raise ValueError(f"{self.path / file}: image {number} of it: {error}: damaged; {MEND}") from error
