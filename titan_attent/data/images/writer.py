"""Writes images to shards: decodes, checks and optionally resizes them, in the order of the inputs.

One thread reads and writes, ``num_threads`` others decode. The output depends only on the inputs and the arguments. A
shard closes at ``shard_images`` images, and before an image of another source. A killed writer leaves no data set; the
same command starts from the beginning.

Cost: every image is decoded once. This includes encoding "file", to find damage and to compute mean and std.
"""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from titan_attent.data.images.classes import Classes, find_classes
from titan_attent.data.images.examples import MAX_FILE_BYTES, MAX_PIXELS, Bad, Limits
from titan_attent.data.images.format import ENCODINGS, ImageShardEntry, write_index
from titan_attent.data.images.inputs import check_unread, open_inputs
from titan_attent.data.images.output import ImageShardWriter, SkippedImages, check_output, remove_leftovers
from titan_attent.data.images.pictures import MAX_READ_PIXELS
from titan_attent.data.images.prepare import Preparation, Prepared, prepare
from titan_attent.data.images.summary import ImageSummary
from titan_attent.data.io.folder import locked
from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.io.walk import LeftOut


def write_images(
    inputs: Sequence[str | Path],
    *,
    output: str | Path,
    size: int = 0,
    grayscale: bool = False,
    encoding: str = "raw",
    classes: Sequence[str] | None = None,
    shard_images: int = 2**16,
    on_bad: str = "refuse",
    keys: tuple[str, str] | None = None,
    max_pixels: int = MAX_PIXELS,
    max_file_bytes: int = MAX_FILE_BYTES,
    all_splits: bool = False,
    num_threads: int = os.cpu_count() or 1,
    progress: bool = False,
) -> ImageSummary:
    """Write the images of ``inputs`` as a data set.

    Args:
        inputs: folders with one folder per class; .parquet, .npz, .tar or .tar.gz files; or folders of .parquet or tar
            files. A string may be a pattern and may start with the name of the data source, ``NAME=PATH``
            (:func:`titan_attent.data.io.inputs.parse_inputs`). Their order is kept.
        output: folder to write, created if missing; it must not be inside an input.
        size: resize the shorter side to this, antialiased, and crop the centre square. 0: keep the size, which must be
            equal for all images.
        grayscale: write one channel instead of three.
        encoding: "raw" pixels, or "file": JPEG, PNG and WebP files byte for byte, of any size.
        classes: names of the classes in order; default: from the inputs (:func:`~.classes.find_classes`).
        shard_images: images per shard.
        on_bad: "refuse" raises at the first image that cannot be used; "skip" skips and lists all of them.
        keys: names of the columns or arrays of images and labels; for tar files the second is a key of the JSON.
            Default: ``IMAGE_KEYS`` and ``LABEL_KEYS`` of examples.py.
        max_pixels: an image that claims more pixels is bad and not decoded.
        max_file_bytes: an image file with more bytes is bad and not read.
        all_splits: allow folders or files named train, test, ... side by side.
        num_threads: number of decoding threads; does not change the output.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an input, image or argument cannot be used, or ``output`` is not free.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    for name, value, choices in (("encoding", encoding, ENCODINGS), ("on_bad", on_bad, ("refuse", "skip"))):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; set it to {' or '.join(choices)}")
    counts = {"shard_images": shard_images, "max_pixels": max_pixels, "max_file_bytes": max_file_bytes}
    for name, count in (counts | {"num_threads": num_threads}).items():
        if count < 1:
            raise ValueError(f"{name} is {count}; set it to 1 or more")
    if size < 0:
        raise ValueError(f"size is {size}; set it to 1 or more, or to 0 to keep the size of the images")
    if encoding == "file" and size:
        raise ValueError("encoding file keeps images as they are: omit size, or write with encoding raw")
    if encoding == "file" and max_pixels > MAX_READ_PIXELS:
        raise ValueError(f"max_pixels is {max_pixels}: set it to at most {MAX_READ_PIXELS}, or write with encoding raw")
    folder, named_paths = Path(output), parse_inputs(inputs)
    paths = [path for _, path in named_paths]
    check_output(folder, paths=paths)
    opened = open_inputs(named_paths, keys=keys, limits=Limits(max_pixels, max_file_bytes), all_splits=all_splits)
    for _, item in opened:
        if item.num_images is not None and on_bad == "refuse":
            check_unread(item, num_images=item.num_images)
    if encoding == "file" and not all(item.holds_files for _, item in opened):
        raise ValueError("encoding file stores files, but a .npz file holds pixels: write with encoding raw")
    names = find_classes([item for _, item in opened], given=classes)
    preparation = Preparation(Classes(names), encoding, 1 if grayscale else 3, size, max_pixels)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with locked(folder):
        check_output(folder, paths=paths)
        remove_leftovers(folder)
        left_out = LeftOut()
        writing = _ShardSet(folder, preparation, shard_images=shard_images, skip=on_bad == "skip")
        bar = tqdm(unit=" images", mininterval=0.2 if sys.stderr.isatty() else 60, disable=not progress)
        try:
            with writing, bar:
                for source, item in opened:
                    with closing(prepare(preparation, item.examples(), num_threads=num_threads)) as examples:
                        num_images = writing.add_all(examples, source=source, bar=bar)
                    left_out.update(item.left_out)
                    if item.num_images is None and on_bad == "refuse":
                        check_unread(item, num_images=num_images)
                if not sum(writing.class_counts):
                    reasons = [text for text in (writing.skipped.summary(), left_out.summary()) if text]
                    raise ValueError(
                        f"{', '.join(map(str, inputs))}: no image in these inputs; give some that hold images"
                        + (f". {'; '.join(reasons)}" if reasons else "")
                    )
                skipped = writing.finish()
            index = write_index(folder, shards=writing.shards, skipped=skipped, **writing.fields())
        except BaseException:
            remove_leftovers(folder)
            raise
    source_images = dict.fromkeys((source for source, _ in opened), 0)
    for shard in index.shards:
        source_images[shard.source] += shard.num_images
    return ImageSummary(
        path=folder,
        num_images=index.num_images,
        num_bytes=sum(shard.num_bytes for shard in index.shards),
        num_shards=len(index.shards),
        classes=index.classes,
        class_counts=index.class_counts,
        skipped=skipped,
        left_out=dict(sorted(left_out.counts.items())),
        source_images=source_images,
        all_gray=writing.all_gray and not grayscale,
        images_per_second=index.num_images / (time.perf_counter() - started),
        fingerprint=index.fingerprint,
    )


class _ShardSet:
    """The shards written so far and their statistics for the index. A context manager that removes unfinished files.

    Args:
        folder: folder to write.
        shard_images: images per shard.
        skip: record images that cannot be used instead of raising a ValueError.
    """

    def __init__(self, folder: Path, preparation: Preparation, *, shard_images: int, skip: bool):
        self.folder, self.preparation, self.shard_images, self.skip = folder, preparation, shard_images, skip
        self.shards: list[ImageShardEntry] = []
        self.class_counts = [0] * len(preparation.classes.names)
        self.all_gray = True
        # Integer counts, so that mean and std depend on neither the order of the images nor rounding.
        self.histogram = np.zeros((preparation.channels, 256), dtype=np.int64)
        self.first: Prepared | None = None
        self.skipped = SkippedImages(folder)
        self.shard: ImageShardWriter | None = None

    def __enter__(self) -> "_ShardSet":
        return self

    def __exit__(self, *exception: object) -> None:
        self.skipped.close()
        if self.shard is not None:
            self.shard.close()

    def add_all(self, examples: Iterable[Prepared | Bad], *, source: str, bar: tqdm) -> int:
        """Write the images of one input and return their number. ValueError for a bad image unless ``skip``."""
        before = sum(self.class_counts)
        if self.shard is not None and self.shard.source != source:
            self._finish_shard()
        for item in examples:
            bar.update()
            image = item if isinstance(item, Bad) else self._check_size(item)
            if isinstance(image, Bad):
                self._reject(image)
                continue
            if self.shard is None:
                path = self.folder / f"shard-{len(self.shards):05d}.bin"
                self.shard = ImageShardWriter(path, source=source, offsets=self.preparation.encoding == "file")
            self.shard.append(image.data, label=image.label)
            self.class_counts[image.label] += 1
            self.all_gray &= image.gray
            self.histogram += np.array(image.histogram, dtype=np.int64).reshape(self.histogram.shape)
            if len(self.shard) == self.shard_images:
                self._finish_shard()
        return sum(self.class_counts) - before

    def _check_size(self, item: Prepared) -> Prepared | Bad:
        """The image, or Bad if raw images must have one size and this one differs from the first."""
        self.first = self.first or item
        if self.preparation.encoding == "file" or item.size == self.first.size:
            return item
        size, first_size = (f"{image.size[0]} x {image.size[1]}" for image in (item, self.first))
        problem = f"is {size} pixels, but the first image, {self.first.where}, is {first_size}"
        fix = "resize all images with --size N, or keep their sizes with --encoding file"
        return Bad(item.where, "size", problem, fix)

    def _reject(self, bad: Bad) -> None:
        if not self.skip:
            raise ValueError(bad.message())
        self.skipped.add(bad)

    def _finish_shard(self) -> None:
        assert self.shard is not None
        self.shards.append(self.shard.finish())
        self.shard = None

    def finish(self) -> dict[str, int]:
        """Write everything durably except the index. Returns the number of skipped images by reason."""
        if self.shard is not None:
            self._finish_shard()
        return self.skipped.finish()

    def fields(self) -> dict[str, object]:
        """The fields of the index except those about shards and skipped images."""
        assert self.first is not None
        raw = self.preparation.encoding == "raw"
        values = np.arange(256) / 255
        shares = self.histogram / self.histogram.sum(axis=1, keepdims=True)
        mean = shares @ values
        std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
        return {
            "encoding": self.preparation.encoding,
            "channels": self.preparation.channels,
            "height": self.first.size[1] if raw else None,
            "width": self.first.size[0] if raw else None,
            "classes": tuple(self.preparation.classes.names),
            "class_counts": tuple(self.class_counts),
            "mean": tuple(np.round(mean, 6).tolist()),
            "std": tuple(np.round(std, 6).tolist()),
        }
