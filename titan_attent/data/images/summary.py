"""What the writer of images tells of what it wrote."""

import sys
from dataclasses import dataclass
from pathlib import Path

from titan_attent.data.io.bad import SKIPPED_FILE


@dataclass(frozen=True, kw_only=True)
class ImageSummary:
    """What the data set holds.

    ``num_bytes`` are those of the images, ``skipped`` counts by reason the images that were left out, ``left_out`` by
    kind what else the inputs hold and is not read, ``source_images`` has every source of the inputs in order, and
    ``all_gray`` tells that three channels were written of images of one.
    """

    path: Path
    num_images: int
    num_bytes: int
    num_shards: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    skipped: dict[str, int]
    left_out: dict[str, int]
    source_images: dict[str, int]
    all_gray: bool
    images_per_second: float
    fingerprint: str


def tell(summary: ImageSummary) -> None:
    """On stdout what was written; on stderr, as warnings, what was not."""
    if len(summary.classes) == 1:
        print(f"warning: all images are of one class, {summary.classes[0]}", file=sys.stderr)
    told = []
    if summary.skipped:
        told.append(f"{_counts(summary.skipped)}; see {summary.path / SKIPPED_FILE}")
    if summary.left_out:
        told.append(f"{_counts(summary.left_out)} (not read)")
    if told:
        print(f"warning: left out {'; and '.join(told)}", file=sys.stderr)
    if empty := [name for name, count in zip(summary.classes, summary.class_counts, strict=True) if not count]:
        print(f"warning: no image of {len(empty)} classes ({', '.join(empty[:5])})", file=sys.stderr)
    print(
        f"{summary.path}: {summary.num_images:,} images of {len(summary.classes):,} classes, "
        f"{summary.num_bytes / 1e6:,.1f} MB in {summary.num_shards:,} shards, {summary.images_per_second:,.0f} images/s"
    )
    if len(summary.source_images) > 1:
        for source, num_images in summary.source_images.items():
            print(f"  {source}: {num_images:,} images ({num_images / summary.num_images:.1%})")
    if summary.all_gray:
        print("  all of them are gray: --grayscale writes a third of this")
    print(f'next: read it with titan_attent.data.images.ImageDataset("{summary.path}")')


def _counts(counts: dict[str, int], *, most: int = 10) -> str:
    """``3 .txt, 1 hidden``; of many the most frequent, and how many the others are."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[most:])
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered[:most]) + (f", {rest:,} others" if rest else "")
