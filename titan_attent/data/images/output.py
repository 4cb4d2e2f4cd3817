"""The output folder of the image writer: the check that it is free, its shards, and the log of skipped images.

Without an index.json these files are leftovers of a killed writer, which the next writer removes.
"""

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from titan_attent.data.images.examples import Bad
from titan_attent.data.images.format import ImageShardEntry
from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.bad import SKIPPED_FILE
from titan_attent.data.io.folder import INDEX_FILE, PROGRESS_FILE

_LEFTOVER = re.compile(rf"(shard-\d{{5,}}(\.labels|\.offsets)?\.bin|{SKIPPED_FILE}|{INDEX_FILE}\.tmp)(\.tmp)?")


def check_output(folder: Path, *, paths: Iterable[Path]) -> None:
    """Raise a ValueError unless ``folder`` is free for a new data set. Leftovers of a killed writer are allowed."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose a folder for --output")
    if (folder / INDEX_FILE).exists():
        raise ValueError(f"{folder}: holds a finished data set; choose another --output, or delete it first")
    for path in paths:
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{folder}: lies inside the input {path}; choose an --output outside of it")
    # A shard of images is renamed into place after its labels. A shard of tokens has no labels file.
    foreign = [path for path in folder.glob("shard-*.bin") if path.name.count(".") == 1]
    foreign = [path for path in foreign if not path.with_suffix(".labels.bin").exists()]
    if foreign or (folder / PROGRESS_FILE).exists():
        raise ValueError(
            f"{folder}: holds shards of another format without their {INDEX_FILE}; choose another --output, or delete "
            "the folder first"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove the files that a killed writer left. A finished data set is not touched."""
    if (folder / INDEX_FILE).exists():
        return
    # A shard is removed before its labels, by which check_output recognizes it.
    for path in sorted(folder.iterdir(), key=lambda path: path.name.count(".")):
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink()


class ImageShardWriter:
    """Streams and hashes the bytes of images into a shard. :meth:`finish` gives its files their names.

    :meth:`close` removes an unfinished shard.

    Args:
        path: path of its .bin file.
        source: data source of its images.
        offsets: whether to write where each image begins, for images of different sizes.
    """

    def __init__(self, path: Path, *, source: str, offsets: bool):
        self.path, self.source = path, source
        self._temporary = path.with_name(path.name + ".tmp")
        self._labels, self._ends = array("i"), array("q", [0]) if offsets else None
        self._num_bytes = 0
        self._file = open(self._temporary, "wb", buffering=2**20)  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._temporary.unlink()

    def __len__(self) -> int:
        return len(self._labels)

    def append(self, data: bytes, *, label: int) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._num_bytes += len(data)
        self._labels.append(label)
        if self._ends is not None:
            self._ends.append(self._num_bytes)

    def finish(self) -> ImageShardEntry:
        """Write the files durably under their names, the .bin last. The folder itself is synced with the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        side_files = [("labels", np.array(self._labels, dtype="<i4"))]
        if self._ends is not None:
            side_files.append(("offsets", np.array(self._ends, dtype="<i8")))
        for name, values in side_files:
            self._sha256.update(values.tobytes())
            write_atomically(self.path.with_suffix(f".{name}.bin"), values.tobytes())
        os.replace(self._temporary, self.path)
        return ImageShardEntry(
            self.path.name, len(self._labels), self._num_bytes, self._sha256.hexdigest(), self.source
        )


class SkippedImages:
    """Counts skipped images by reason, keeps the first of each, and writes one line of JSON per image to skipped.jsonl.

    :meth:`close` removes an unfinished file.
    """

    def __init__(self, folder: Path):
        self.counts: Counter[str] = Counter()
        self.first: dict[str, Bad] = {}
        self._path = folder / SKIPPED_FILE
        self._temporary = folder / f"{SKIPPED_FILE}.tmp"
        self._file = open(self._temporary, "w", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._temporary.unlink()

    def add(self, bad: Bad) -> None:
        self.counts[bad.reason] += 1
        self.first.setdefault(bad.reason, bad)
        self._file.write(bad.line())

    def summary(self) -> str:
        """``2 label (first: a.tar: 0.png: an empty .cls; write ...)``; "" if no image was skipped."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            first = self.first[reason]
            parts.append(f"{count:,} {reason} (first: {first.where}: {first.problem}; {first.fix})")
        return ", ".join(parts)

    def finish(self) -> dict[str, int]:
        """Rename the file into place, unless it is empty. Returns the counts by reason."""
        if self.counts:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
        return dict(sorted(self.counts.items()))
