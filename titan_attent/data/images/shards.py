"""Image shards: example id -> label, pixels or file bytes, by positioned reads.

Example ids count the images of all shards (format.py) in order, from 0. No image is kept in memory. A span is a run of
consecutive ids within one shard; it is read at once.

Cost: opening reads index.json and takes 32 bytes of memory per shard besides the index. A span takes one read for its
labels and one for its pixels, or two for its files. Any number of threads may read at once.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from titan_attent.data.images.format import WRITER, ImageIndex, ImageShardEntry, read_index
from titan_attent.data.io.files import HASH_BLOCK, OpenFiles
from titan_attent.data.io.folder import INDEX_FILE

_LARGE_READ = 2**26
FIX = f"copy the data set again, or write it again with {WRITER}"


class ImageShards:
    """The images of a data set folder. Picklable.

    Opening does not check the shards. The caller must call :meth:`check_sizes`; ranks can share its work.

    Raises:
        ValueError: the folder or its index is missing, malformed, of another format or edited.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.index: ImageIndex = read_index(self.path)
        self._ends = np.cumsum([shard.num_images for shard in self.index.shards], dtype=np.int64)
        self._files = OpenFiles(self.path)

    def check_sizes(self, shards: Iterable[int] | None = None) -> None:
        """Compare the sizes of shards, given by index (default: all), with index.json; one stat per file.

        Ranks share the work with ``range(rank, num_shards, world_size)``.

        Raises:
            ValueError: a file is missing, truncated or replaced; the message names it.
        """
        for number in range(len(self.index.shards)) if shards is None else shards:
            for name, expected in self.index.file_sizes(self.index.shards[number]).items():
                path = self.path / name
                try:
                    actual = path.stat().st_size
                except FileNotFoundError as error:
                    raise ValueError(f"{path}: this file of a shard in {INDEX_FILE} is missing; {FIX}") from error
                if actual != expected:
                    raise ValueError(
                        f"{path}: has {actual} bytes, but {INDEX_FILE} says {expected}: truncated or replaced; {FIX}"
                    )

    def verify_checksums(self, shards: Iterable[int] | None = None, *, progress: bool = False) -> None:
        """Hash shards, given by index (default: all), and compare them with index.json; about 1 GB/s.

        Ranks share the work with ``range(rank, num_shards, world_size)``.

        Raises:
            ValueError: a shard differs from the index; the message names it.
        """
        numbers = range(len(self.index.shards)) if shards is None else shards
        entries = [self.index.shards[number] for number in numbers]
        num_bytes = sum(sum(self.index.file_sizes(entry).values()) for entry in entries)
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
            for entry in entries:
                sha256, names = hashlib.sha256(), list(self.index.file_sizes(entry))
                for name in names:
                    with open(self.path / name, "rb") as file:
                        while block := file.read(HASH_BLOCK):
                            sha256.update(block)
                            bar.update(len(block))
                if sha256.hexdigest() != entry.sha256:
                    raise ValueError(
                        f"{self.path / entry.file}: the sha256 over {', '.join(names)} is {sha256.hexdigest()}, but "
                        f"{INDEX_FILE} says {entry.sha256}: the shard is damaged; {FIX}"
                    )

    def checked_ids(self, ids: Tensor) -> np.ndarray:
        """Ids int64 [B] as a numpy array; IndexError if one is outside [0, N)."""
        array = ids.numpy()
        if len(array) and not 0 <= (smallest := int(array.min())) <= (largest := int(array.max())) < len(self):
            wrong = smallest if smallest < 0 else largest
            raise IndexError(f"{self.path}: example id {wrong} is outside [0, {len(self)})")
        return array

    def __len__(self) -> int:
        return self.index.num_images

    @property
    def num_shards(self) -> int:
        return len(self.index.shards)

    def locate(self, i: int) -> tuple[str, int]:
        """The shard file of image i, and its index within the shard; IndexError outside [0, N)."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: example id {i} is outside [0, {len(self)})")
        number = int(np.searchsorted(self._ends, i, side="right"))
        shard = self.index.shards[number]
        return shard.file, i - int(self._ends[number]) + shard.num_images

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels of images, int64 [B] in [0, N) -> int64 [B]; ValueError if a label on disk is not a class."""
        labels = np.empty(len(ids), dtype="<i4")
        for shard, rows, slot in self._spans(ids):
            self._read_into(labels[rows], shard.labels_file, 4 * slot)
            if not (labels[rows] < len(self.index.classes)).all() or (labels[rows] < 0).any():
                raise ValueError(
                    f"{self.path / shard.labels_file}: holds a label outside [0, {len(self.index.classes)}): damaged; "
                    f"{FIX}"
                )
        return labels.astype(np.int64)

    def raw(self, ids: np.ndarray) -> np.ndarray:
        """Pixels of images of encoding "raw", int64 [B] in [0, N) -> uint8 [B, H, W, C]."""
        assert self.index.height is not None and self.index.width is not None
        shape = (self.index.height, self.index.width, self.index.channels)
        for shard, rows, slot in self._spans(ids):
            size = math.prod(shape)
            self._check_length(shard.file, offset=slot * size, num_bytes=(rows.stop - rows.start) * size)
        pixels = np.empty((len(ids), *shape), dtype=np.uint8)
        for shard, rows, slot in self._spans(ids):
            self._read_into(pixels[rows], shard.file, slot * math.prod(shape))
        return pixels

    def file_bytes(self, ids: np.ndarray) -> list[bytes]:
        """The files of images of encoding "file", int64 [B] in [0, N); ValueError if the offsets are damaged."""
        files: list[bytes] = []
        for shard, rows, slot in self._spans(ids):
            offsets = np.empty(rows.stop - rows.start + 1, dtype="<i8")
            self._read_into(offsets, shard.offsets_file, 8 * slot)
            bounds = offsets.tolist()
            if bounds[0] < 0 or bounds[-1] > shard.num_bytes or bounds != sorted(bounds):
                raise ValueError(f"{self.path / shard.offsets_file}: has no rising offsets into {shard.file}; {FIX}")
            self._check_length(shard.file, offset=bounds[0], num_bytes=bounds[-1] - bounds[0])
            content = np.empty(bounds[-1] - bounds[0], dtype=np.uint8)
            self._read_into(content, shard.file, bounds[0])
            data = content.tobytes()
            files += [data[a - bounds[0] : b - bounds[0]] for a, b in zip(bounds, bounds[1:], strict=False)]
        return files

    def _spans(self, ids: np.ndarray) -> Iterator[tuple[ImageShardEntry, slice, int]]:
        """The spans of ``ids``: the shard, the rows of the batch, and the slot of the first image within the shard."""
        shards = np.searchsorted(self._ends, ids, side="right")
        breaks = np.flatnonzero((np.diff(ids) != 1) | (np.diff(shards) != 0)) + 1
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ids)], strict=True):
            if start < stop:
                shard = self.index.shards[shards[start]]
                slot = int(ids[start]) - int(self._ends[shards[start]]) + shard.num_images
                yield shard, slice(start, stop), slot

    def _check_length(self, name: str, *, offset: int, num_bytes: int) -> None:
        """Raise a ValueError if a file is too short for a large read. Called before memory is allocated for it."""
        if num_bytes < _LARGE_READ:
            return
        path = self.path / name
        if (size := path.stat().st_size) < offset + num_bytes:
            raise ValueError(
                f"{path}: ends at byte {size}, before byte {offset + num_bytes} that is to be read: truncated or "
                f"replaced; {FIX}"
            )

    def _read_into(self, array: np.ndarray, name: str, offset: int) -> None:
        self._files.read_into(array.reshape(-1).view(np.uint8).data, name=name, offset=offset)
