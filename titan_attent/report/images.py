"""Of runs of images: those taught most and least, and those that the quarantine set aside, to look at.

    RUN/images.png       from teacher/trace.jsonl: the 48 images that were trained most often, and the 48 least often
    RUN/quarantine.png   from teacher/quarantine.jsonl: the first 96 that no selection takes any more

Both need the data set where the run had it (teacher/data.json). Among images of as many visits those with the smaller
ids come first.

Cost: one pass over the trace, a million ids a second, and 8 bytes an image of the data set; the sheets take a second.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from titan_attent.data.images import ImageDataset
from titan_attent.report.picture import write_whole
from titan_attent.report.sheets import BOX, Cell, draw_sheet

MOST, MOST_QUARANTINED = 48, 96
HINT = "set teacher.trace = true to see what was taught most and least"


def draw_images(run: Path) -> tuple[list[Path], str | None]:
    """Write the sheets for which the run in the folder ``run`` has the files.

    Returns:
        What was written, and what to do to see more; neither for a run of text.

    Raises:
        ValueError: a line of those files is not the teacher's, the data set has changed or is damaged, a sheet cannot
            be written.
    """
    images = open_images(run)
    if images is None:
        return [], None
    trace, quarantine, sheets = run / "teacher" / "trace.jsonl", run / "teacher" / "quarantine.jsonl", {}
    if trace.is_file():
        sheets[run / "images.png"] = draw_taught(run, images, *count_visits(trace, len(images)))
    if quarantine.is_file() and (set_aside := read_quarantined(quarantine, len(images))):
        sheets[run / "quarantine.png"] = draw_quarantined(run, images, set_aside)
    for path, sheet in sheets.items():
        _save(sheet, path)
    return list(sheets), None if trace.is_file() else f"{run}: {HINT}"


def open_images(run: Path) -> ImageDataset | None:
    """The data set of images that a run was trained on; None for one of text, and where it is no longer there."""
    try:
        folder = Path(json.loads((run / "teacher" / "data.json").read_bytes())["path"])
        index = json.loads((folder / "index.json").read_bytes())
        if index["format"] != "titan_attent.images":
            return None
        height, width = index["height"], index["width"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Small ones as they are, to be shown in whole pixels.
    is_small = height is not None and height == width and height <= BOX
    return ImageDataset(folder, size=0 if is_small else BOX)


def count_visits(trace: Path, num_images: int) -> tuple[np.ndarray, int]:
    """How often each image was trained, int64 [num_images], and in how many steps."""
    visits, num_steps = np.zeros(num_images, np.int64), 0
    for _, ids in _lines(trace, "ids", num_images):
        np.add.at(visits, ids, 1)
        num_steps += 1
    return visits, num_steps


def read_quarantined(path: Path, num_images: int) -> dict[int, int]:
    """Id -> the step that set it aside, by the id's last line; in the order of their first lines."""
    return {i: step for step, ids in _lines(path, "example_id", num_images) for i in ids.tolist()}


def draw_taught(run: Path, images: ImageDataset, visits: np.ndarray, num_steps: int) -> Image.Image:
    """The images of the most visits and of the fewest."""
    blocks = []
    for name, order in (("most", np.argsort(-visits, kind="stable")), ("least", np.argsort(visits, kind="stable"))):
        ids = order[:MOST]
        counts = visits[ids].tolist()
        heading = f"taught {name}: {len(ids)} images of {_count(max(counts), 'visit', min(counts))}"
        if name == "least" and (never := int((visits == 0).sum())):
            heading += f"; {_count(never, 'image')} never taught"
        notes = [(_count(count, "visit"), f"id {i}") for i, count in zip(ids.tolist(), counts, strict=True)]
        blocks.append((heading, _cells(images, ids, notes)))
    title = f"taught most and least of {_count(len(visits), 'image')} in {_count(num_steps, 'step')}"
    return draw_sheet(f"{title}, {visits.mean():.3g} visits on average: {run}", blocks)


def draw_quarantined(run: Path, images: ImageDataset, set_aside: dict[int, int]) -> Image.Image:
    """The first images that were set aside, with the step from which on no selection takes them."""
    ids = np.array(list(set_aside)[:MOST_QUARANTINED])
    notes = [(f"id {i}", f"step {set_aside[i]:,}") for i in ids.tolist()]
    shown = f"the first {len(ids)} of " if len(set_aside) > len(ids) else ""
    title = f"{shown}{_count(len(set_aside), 'image')} that the quarantine set aside: {run}"
    return draw_sheet(title, [("", _cells(images, ids, notes))])


def _cells(images: ImageDataset, ids: np.ndarray, notes: Sequence[Sequence[str]]) -> list[Cell]:
    """Each image with its class and its notes."""
    labels = images.labels(torch.from_numpy(ids)).tolist()
    return [
        Cell(images.thumbnail(i), [images.classes[label], *lines])
        for i, label, lines in zip(ids.tolist(), labels, notes, strict=True)
    ]


def _count(number: int, name: str, start: int | None = None) -> str:
    """A number, or from ``start`` to it, of things."""
    several = "" if start in (None, number) else f"{start:,} to "
    return f"{several}{number:,} {name}{'s' * (number != 1)}"


def _lines(path: Path, key: str, num_images: int) -> Iterator[tuple[int, np.ndarray]]:
    """The step of each line and its ids, int64 [n], under ``key``; ValueError names a bad line. A last line without its
    end was cut short by a kill, or is being written: it is left out."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                step, ids = int(record["step"]), np.array(record[key], np.int64).reshape(-1)
            except (ValueError, TypeError, KeyError, OverflowError):
                raise ValueError(
                    f"{path}, line {number} is not the teacher's: {line.strip()[:60]!r}. Move the file away, and the "
                    "report will do without it"
                ) from None
            if len(ids) and not 0 <= ids.min() <= ids.max() < num_images:
                raise ValueError(
                    f"{path}, line {number} names an image beyond the {num_images:,} of the data set, which is not the "
                    "one that was trained: put that back, or move the file away"
                )
            yield step, ids


def _save(sheet: Image.Image, path: Path) -> None:
    try:
        write_whole(path, lambda file: sheet.save(file, format="PNG"))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
