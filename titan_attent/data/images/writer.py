"""Images to shards: decoded, checked, resized if asked, and written in the order of the inputs.

One thread reads and writes, ``num_threads`` others decode. What is written depends on the inputs and arguments alone.
A shard closes at ``shard_images`` images, and before an image of another source. A killed writer leaves no data set;
the same command starts anew.

Cost: every image is decoded once, of encoding "file" too, whose damage, mean and std are found that way.
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
from titan_attent.data.images.output import ImageShardWriter, Skipped, check_output, clear
from titan_attent.data.images.pictures import READ_PIXELS
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
        inputs: folders with a folder a class; .parquet, .npz, .tar or .tar.gz files, or folders of .parquet or tar
            files. A string may be a pattern, and name the data source in front, ``NAME=PATH``
            (:func:`titan_attent.data.text.inputs.parse_inputs`). They stay in their order.
        output: the folder to write, made if missing; not inside an input.
        size: resize the shorter side to it, antialiased, and cut the centre square; 0: as they are, all of one size.
        grayscale: one channel, not three.
        encoding: "raw" pixels, or "file": JPEG, PNG and WebP files byte for byte, of any size.
        classes: names of the classes in order; by default found in the inputs (:func:`~.classes.find_classes`).
        shard_images: a shard closes with so many.
        on_bad: "refuse" the first image that cannot be used, or "skip" and list all of them.
        keys: columns, arrays, or (the second) JSON key that hold images and labels; by default the usual names.
        max_pixels: of an image; what claims more is bad, and not decoded.
        max_file_bytes: of the file of an image; what has more is bad, and not read.
        all_splits: read folders or files named train, test, ... beside each other like any others.
        num_threads: that decode; they do not change what is written.
        progress: show a bar on stderr.

    Raises:
        ValueError: an input, image or argument that cannot be used, or an ``output`` that is not free.
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
        raise ValueError("encoding file keeps images as they are: leave the size out, or write with encoding raw")
    if encoding == "file" and max_pixels > READ_PIXELS:
        raise ValueError(f"max_pixels is {max_pixels}: set it to at most {READ_PIXELS}, or write with encoding raw")
    folder, named_paths = Path(output), parse_inputs(inputs)
    paths = [path for _, path in named_paths]
    check_output(folder, paths=paths)
    opened = open_inputs(named_paths, keys=keys, limits=Limits(max_pixels, max_file_bytes), all_splits=all_splits)
    for _, item in opened:
        if item.num_images is not None and on_bad == "refuse":
            check_unread(item, num_images=item.num_images)
    if encoding == "file" and not all(item.holds_files for _, item in opened):
        raise ValueError("encoding file keeps files, but a .npz file holds pixels: write with encoding raw")
    names = find_classes([item for _, item in opened], given=classes)
    preparation = Preparation(Classes(names), encoding, 1 if grayscale else 3, size, max_pixels)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with locked(folder):
        check_output(folder, paths=paths)
        clear(folder)
        left_out = LeftOut()
        writing = _Writing(folder, preparation, shard_images=shard_images, skip=on_bad == "skip")
        bar = tqdm(unit=" images", mininterval=0.2 if sys.stderr.isatty() else 60, disable=not progress)
        try:
            with writing, bar:
                for source, item in opened:
                    with closing(prepare(preparation, item.examples(), num_threads=num_threads)) as examples:
                        num_images = writing.add_all(examples, source=source, bar=bar)
                    left_out.update(item.left_out)
                    if item.num_images is None and on_bad == "refuse":
                        check_unread(item, num_images=num_images)
                if not sum(writing.counts):
                    reasons = [text for text in (writing.skipped.tell(), left_out.summary()) if text]
                    raise ValueError(
                        f"{', '.join(map(str, inputs))}: no image in these inputs; give some that hold images"
                        + (f". {'; '.join(reasons)}" if reasons else "")
                    )
                skipped = writing.finish()
            index = write_index(folder, shards=writing.shards, skipped=skipped, **writing.fields())
        except BaseException:
            clear(folder)
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


class _Writing:
    """The shards written so far and what the index will say of them. A context manager, which drops what is unfinished.

    Args:
        folder: that is written.
        shard_images: of a shard.
        skip: record what is bad; else ValueError.
    """

    def __init__(self, folder: Path, preparation: Preparation, *, shard_images: int, skip: bool):
        self.folder, self.preparation, self.shard_images, self.skip = folder, preparation, shard_images, skip
        self.shards: list[ImageShardEntry] = []
        self.counts = [0] * len(preparation.classes.names)
        self.all_gray = True
        # Exact: neither the order of the images nor rounding changes mean and std.
        self.histogram = np.zeros((preparation.channels, 256), dtype=np.int64)
        self.first: Prepared | None = None
        self.skipped = Skipped(folder)
        self.shard: ImageShardWriter | None = None

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *exception: object) -> None:
        self.skipped.close()
        if self.shard is not None:
            self.shard.close()

    def add_all(self, examples: Iterable[Prepared | Bad], *, source: str, bar: tqdm) -> int:
        """Write the images of one input; how many. ValueError at a bad one, unless they are skipped."""
        before = sum(self.counts)
        if self.shard is not None and self.shard.source != source:
            self._finish_shard()
        for item in examples:
            bar.update()
            good = item if isinstance(item, Bad) else self._of_one_size(item)
            if isinstance(good, Bad):
                self._reject(good)
                continue
            if self.shard is None:
                path = self.folder / f"shard-{len(self.shards):05d}.bin"
                self.shard = ImageShardWriter(path, source=source, offsets=self.preparation.encoding == "file")
            self.shard.append(good.data, label=good.label)
            self.counts[good.label] += 1
            self.all_gray &= good.gray
            self.histogram += np.array(good.histogram, dtype=np.int64).reshape(self.histogram.shape)
            if len(self.shard) == self.shard_images:
                self._finish_shard()
        return sum(self.counts) - before

    def _of_one_size(self, item: Prepared) -> Prepared | Bad:
        self.first = self.first or item
        if self.preparation.encoding == "file" or item.size == self.first.size:
            return item
        here, there = (f"{image.size[0]} x {image.size[1]}" for image in (item, self.first))
        problem = f"is {here} pixels where the first image, {self.first.where}, is {there}"
        return Bad(
            item.where, "size", problem, "bring all to one size with --size N, or keep them with --encoding file"
        )

    def _reject(self, bad: Bad) -> None:
        if not self.skip:
            raise ValueError(bad.message())
        self.skipped.add(bad)

    def _finish_shard(self) -> None:
        assert self.shard is not None
        self.shards.append(self.shard.finish())
        self.shard = None

    def finish(self) -> dict[str, int]:
        """Publish all but the index; what was left out, by reason."""
        if self.shard is not None:
            self._finish_shard()
        return self.skipped.finish()

    def fields(self) -> dict[str, object]:
        """What the index says beside its shards."""
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
            "class_counts": tuple(self.counts),
            "mean": tuple(np.round(mean, 6).tolist()),
            "std": tuple(np.round(std, 6).tolist()),
        }
