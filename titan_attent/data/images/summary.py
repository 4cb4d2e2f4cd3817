"""The summary of a written image data set, and how the command prints it."""

import sys
from dataclasses import dataclass
from pathlib import Path

from titan_attent.data.io.bad import SKIPPED_FILE


@dataclass(frozen=True, kw_only=True)
class ImageSummary:
    """The content of a written data set.

    Attributes:
        num_bytes: bytes of the images, without labels and offsets.
        skipped: number of images that could not be used, by reason.
        left_out: number of other files of the inputs that were not read, by file type or reason.
        source_images: number of images of every data source, in the order of the inputs.
        all_gray: whether three channels were written although all images have one.
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


def print_summary(summary: ImageSummary) -> None:
    """Print the summary of the written images to stdout, and warnings about all others to stderr."""
    if len(summary.classes) == 1:
        print(f"warning: all images are of one class, {summary.classes[0]}", file=sys.stderr)
    parts = []
    if summary.skipped:
        parts.append(f"{_top_counts(summary.skipped)}; see {summary.path / SKIPPED_FILE}")
    if summary.left_out:
        parts.append(f"{_top_counts(summary.left_out)} (not read)")
    if parts:
        print(f"warning: left out {'; and '.join(parts)}", file=sys.stderr)
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


def _top_counts(counts: dict[str, int], *, limit: int = 10) -> str:
    """The ``limit`` most frequent reasons and the number of all others: ``3 .txt, 1 hidden, 2 others``."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in ordered[limit:])
    top = ", ".join(f"{count:,} {reason}" for reason, count in ordered[:limit])
    return top + (f", {others:,} others" if others else "")
