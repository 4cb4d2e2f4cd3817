"""The image data set on disk.

    DIR/index.json                 encoding, sizes, classes, mean and std, shards with sources and hashes, fingerprint
    DIR/shard-00000.bin            the bytes of the images, concatenated
    DIR/shard-00000.labels.bin     their labels, little-endian int32 [n]
    DIR/shard-00000.offsets.bin    encoding "file" only: where each image begins in .bin, and the end, int64 [n + 1]
    DIR/skipped.jsonl              the images that were left out, with reasons; missing if there are none

Encoding "raw" holds uint8 pixels [H, W, C], all images of one size. Encoding "file" holds JPEG, PNG or WebP files byte
for byte, of any size. index.json is written last and makes the folder a data set. The fingerprint identifies the
training data: with equal fingerprints, equal example ids have equal pixels and labels. It ignores the names of sources
and files.

Cost: about 200 bytes of index per shard, independent of the number of images; one sha256 over the bytes as they are
written.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.folder import INDEX_FILE, check_file_name, is_source_name
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned

FORMAT = "titan_attent.images"
VERSION = 1
ENCODINGS = ("raw", "file")
MIN_STD = 5e-7
WRITER = "`python -m titan_attent.data.images`"


@dataclass(frozen=True)
class ImageShardEntry:
    """One shard in the index.

    Attributes:
        file: name of its .bin file.
        num_bytes: bytes of the .bin file.
        sha256: hex digest of all of its files, concatenated: .bin, .labels.bin, .offsets.bin.
        source: data source of its images.
    """

    file: str
    num_images: int
    num_bytes: int
    sha256: str
    source: str

    def __post_init__(self) -> None:
        check_file_name(self.file, of="shard")
        if not self.file.endswith(".bin"):
            raise ValueError(f"shard {self.file!r} is not a .bin file")

    @property
    def labels_file(self) -> str:
        return self.file[:-3] + "labels.bin"

    @property
    def offsets_file(self) -> str:
        return self.file[:-3] + "offsets.bin"


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """The content of ``index.json``; ``height`` and ``width`` are None for encoding "file".

    ``mean`` and ``std`` have one value per channel, over all pixels, in pixels / 255. ``skipped`` has the number of
    images that the writer left out, by reason.
    """

    encoding: str
    num_images: int
    channels: int
    height: int | None
    width: int | None
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: dict[str, int]
    shards: tuple[ImageShardEntry, ...]
    fingerprint: str

    def file_sizes(self, shard: ImageShardEntry) -> dict[str, int]:
        """The files of a shard with their sizes in bytes, in the order in which they are hashed."""
        sizes = {shard.file: shard.num_bytes, shard.labels_file: 4 * shard.num_images}
        if self.encoding == "file":
            sizes[shard.offsets_file] = 8 * (shard.num_images + 1)
        return sizes


def _fingerprint(fields: dict[str, Any], shards: Sequence[ImageShardEntry]) -> str:
    """The sha256 (hex) over everything that determines pixels and labels."""
    content = {name: fields[name] for name in ("encoding", "channels", "height", "width", "classes", "mean", "std")}
    content["shards"] = [[shard.num_images, shard.num_bytes, shard.sha256] for shard in shards]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def write_index(folder: Path, *, shards: Sequence[ImageShardEntry], **fields: Any) -> ImageIndex:
    """Write ``folder/index.json``, which makes the folder a data set. Its shards must already be written.

    Args:
        shards: all shards, in order.
        fields: the fields of :class:`ImageIndex` except ``shards``, ``num_images`` and ``fingerprint``.
    """
    index = ImageIndex(
        **fields,
        num_images=sum(shard.num_images for shard in shards),
        shards=tuple(shards),
        fingerprint=_fingerprint(fields, shards),
    )
    _check_consistency(index)
    write_atomically(folder / INDEX_FILE, encode_versioned(asdict(index), format=FORMAT, version=VERSION))
    return index


def read_index(folder: Path) -> ImageIndex:
    """Read ``folder/index.json``; ValueError if it is missing, malformed, of another format or edited."""
    path = folder / INDEX_FILE
    if not path.is_file():
        problem = f"no {INDEX_FILE} in it" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{folder}: not a data set of images, {problem}; correct the path, or make one with "
            f"{WRITER[:-1]} INPUT --output {folder}`"
        )
    fix = f"restore the file, or write the data set anew with {WRITER}"
    fields = read_versioned(path, format=FORMAT, versions=(VERSION,), fix=fix)
    try:
        if isinstance(fields.get("classes"), list):
            check_classes(fields["classes"])
        for name in ("mean", "std"):
            _check_finite(name, fields.get(name))
        index = typed(ImageIndex, fields)
        _check_consistency(index)
        fingerprint = _fingerprint(asdict(index), index.shards)
    except ValueError as error:
        raise ValueError(f"{path}: malformed index ({error}); {fix}") from error
    if fingerprint != index.fingerprint:
        raise ValueError(
            f"{path}: its fingerprint is {index.fingerprint}, but its content gives {fingerprint}: the "
            f"index was edited after it was written; {fix}"
        )
    return index


def _check_finite(name: str, values: object) -> None:
    if isinstance(values, list) and any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise ValueError(f"{name} {str(values)[:80]} is not one finite number per channel")


def _check_consistency(index: ImageIndex) -> None:
    if index.encoding not in ENCODINGS:
        raise ValueError(f"encoding {index.encoding!r} is neither raw nor file")
    if index.channels not in (1, 3):
        raise ValueError(f"channels is {index.channels!r}, neither 1 nor 3")
    raw = index.encoding == "raw"
    for side in (index.height, index.width):
        if not (side is not None and side > 0 if raw else side is None):
            raise ValueError(f"encoding {index.encoding!r} with height {index.height!r} and width {index.width!r}")
    for shard in index.shards:
        if shard.num_images < 1 or shard.num_bytes < 1:
            raise ValueError(
                f"shard {shard.file!r} of {shard.num_images} images, {shard.num_bytes} bytes; neither may be < 1"
            )
        if raw and shard.num_bytes != shard.num_images * index.height * index.width * index.channels:  # type: ignore[operator]
            raise ValueError(f"shard {shard.file!r} has {shard.num_bytes} bytes for {shard.num_images} images")
        if not is_source_name(shard.source):
            raise ValueError(f"source {shard.source!r} of shard {shard.file!r}; use letters, digits, '_', '.' and '-'")
    if not 0 < index.num_images == sum(shard.num_images for shard in index.shards):
        raise ValueError(f"num_images {index.num_images} is not the sum over the shards")
    check_classes(index.classes)
    if len(index.class_counts) != len(index.classes) or sum(index.class_counts) != index.num_images:
        raise ValueError("class_counts do not have one count per class, or do not add up to num_images")
    if min((*index.class_counts, *index.skipped.values())) < 0:
        raise ValueError("class_counts or skipped have a count below 0")
    # The writer rounds both to six digits, so a std between 0 and 1e-6 is an error; it would make pixels infinite.
    for name, values, limit in (("mean", index.mean, 1.0), ("std", index.std, 0.5)):
        if len(values) != index.channels or not all(0 <= value <= limit for value in values):
            raise ValueError(f"{name} {str(values)[:80]} is not one finite number per channel, of pixels in [0, 1]")
    if any(0 < value < MIN_STD for value in index.std):
        raise ValueError(f"std {index.std} has a value between 0 and {MIN_STD}")


def check_classes(classes: Sequence[str]) -> None:
    """Raise a ValueError if there are no classes, or their names are empty, not strings, or not distinct."""
    if not classes:
        raise ValueError("no classes")
    for name in classes:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of a class is {name!r}; it must be a string that is not empty")
    if len(set(classes)) < len(classes):
        duplicate = Counter(classes).most_common(1)[0][0]
        raise ValueError(f"the class {duplicate!r} appears twice in the list of classes")
