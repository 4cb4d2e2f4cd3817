"""Of runs of images: those taught most and least, and those that the quarantine set aside, to look at.

    RUN/images.png       from teacher/trace.jsonl: the 48 images that were trained most often, and the 48 least often
    RUN/quarantine.png   from teacher/quarantine.jsonl: the first 96 that no selection takes any more

Both need the data set where the run had it, with the fingerprint that it had (teacher/data.json); of another one
nothing is drawn. Among images of as many visits those with the smaller ids come first.

Cost: one pass over the trace, a million ids a second, and 8 bytes an image of the data set; the sheets take a second.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from titan_attent.data.images import ImageDataset
from titan_attent.data.run_record import read_run_record
from titan_attent.report.picture import write_whole
from titan_attent.report.reading import json_lines, step_of
from titan_attent.report.sheets import BOX, Cell, draw_sheet

MOST, MOST_QUARANTINED = 48, 96
HINT = "set teacher.trace = true to see what was taught most and least"


@dataclass
class Sheets:
    """What was written for a run, what to do to see more, and what could not be shown and why."""

    files: list[Path] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw_images(run: Path) -> Sheets:
    """Write the sheets for which the run in the folder ``run`` has the files; none for a run of text, nor of another
    data set than the one that was trained. OSError if a sheet cannot be written."""
    found = Sheets()
    try:
        images = open_images(run)
        if images is None:
            return found
        trace, quarantine = run / "teacher" / "trace.jsonl", run / "teacher" / "quarantine.jsonl"
        sheets = dict[Path, Image.Image]()
        if trace.is_file():
            sheets[run / "images.png"] = draw_taught(run, images, *count_visits(trace, len(images), found.notes))
        else:
            found.hints.append(f"{run}: {HINT}")
        if quarantine.is_file() and (set_aside := read_quarantined(quarantine, len(images), found.notes)):
            sheets[run / "quarantine.png"] = draw_quarantined(run, images, set_aside)
    except ValueError as error:
        found.notes.append(f"{run}: its images are left out: {error}")
        return found
    for path, sheet in sheets.items():
        try:
            write_whole(path, partial(sheet.save, format="PNG"))
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        found.files.append(path)
    return found


def open_images(run: Path) -> ImageDataset | None:
    """The data set of images that a run was trained on; None for one of text, and where it is no longer there.

    Raises:
        ValueError: it has changed since, or is damaged.
    """
    told = read_run_record(run)
    folder = Path(told.path)
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if not told.path or index["format"] != "titan_attent.images":
            return None
        height, width = index["height"], index["width"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # Small ones as they are, to be shown in whole pixels.
    is_small = isinstance(height, int) and height == width and height <= BOX
    images = ImageDataset(folder, size=0 if is_small else BOX)
    if told.fingerprint not in (None, images.fingerprint):
        raise ValueError(
            f"{folder} has changed since: the run was trained on the data set of fingerprint {told.fingerprint}, and "
            f"this one has {images.fingerprint}. Put that back to see what was taught"
        )
    return images


def count_visits(trace: Path, num_images: int, notes: list[str] | None = None) -> tuple[np.ndarray, int]:
    """How often each image was trained, int64 [num_images], and in how many steps."""
    visits, num_steps = np.zeros(num_images, np.int64), 0
    for _, ids in _lines(trace, "ids", num_images, [] if notes is None else notes):
        np.add.at(visits, ids, 1)
        num_steps += 1
    return visits, num_steps


def read_quarantined(path: Path, num_images: int, notes: list[str] | None = None) -> dict[int, int]:
    """Id -> the step that set it aside, by the id's last line; in the order of their first lines."""
    return {
        i: step
        for step, ids in _lines(path, "example_id", num_images, [] if notes is None else notes)
        for i in ids.tolist()
    }


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


def _lines(path: Path, key: str, num_images: int, notes: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """The step of each line and its ids, int64 [n], under ``key``; lines that are not the teacher's are left out and
    noted. ValueError names a line of another data set."""

    def parse(record: Any) -> tuple[int, np.ndarray]:
        return step_of(record), np.array(record[key], np.int64).reshape(-1)

    for step, ids in json_lines(path, parse, "the teacher's", notes):
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_images:
            raise ValueError(
                f"{path}, step {step} names an image beyond the {num_images:,} of the data set, which is not the one "
                "that was trained: put that back, or move the file away"
            )
        yield step, ids
