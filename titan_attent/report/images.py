"""Sheets of images for runs on images: those trained most and least often, and those in quarantine.

    RUN/images.png       from teacher/trace.jsonl: the 48 images that were trained most often, and the 48 least often
    RUN/quarantine.png   from teacher/quarantine.jsonl: the first 96 images that are no longer selected

Both need the data set in the folder that the run read, with the same fingerprint (teacher/data.json); otherwise nothing
is drawn. Images with equal numbers of visits are ordered by id.

Cost: one pass over the trace, a million ids per second, and 8 bytes per image of the data set; a second for the sheets.
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

MAX_TRAINED, MAX_QUARANTINED = 48, 96
HINT = "set teacher.trace = true to see the images that were trained most and least often"


@dataclass
class Sheets:
    """The files written for a run, hints on how to see more, and notes on why something could not be shown."""

    files: list[Path] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw_images(run: Path) -> Sheets:
    """Write the sheets for which the folder ``run`` has the files; OSError if a sheet cannot be written.

    Nothing is written for a run on text, nor where the data set is not the one that the run was trained on.
    """
    result = Sheets()
    try:
        images = open_images(run)
        if images is None:
            return result
        trace, quarantine = run / "teacher" / "trace.jsonl", run / "teacher" / "quarantine.jsonl"
        sheets = dict[Path, Image.Image]()
        if trace.is_file():
            sheets[run / "images.png"] = draw_trained(run, images, *count_visits(trace, len(images), result.notes))
        else:
            result.hints.append(f"{run}: {HINT}")
        if quarantine.is_file() and (quarantined := read_quarantined(quarantine, len(images), result.notes)):
            sheets[run / "quarantine.png"] = draw_quarantined(run, images, quarantined)
    except ValueError as error:
        result.notes.append(f"{run}: its images are left out: {error}")
        return result
    for path, sheet in sheets.items():
        try:
            write_whole(path, partial(sheet.save, format="PNG"))
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        result.files.append(path)
    return result


def open_images(run: Path) -> ImageDataset | None:
    """The image data set that a run was trained on; None for a run on text, and where the data set no longer exists.

    Raises:
        ValueError: the data set has changed since the run, or is damaged.
    """
    record = read_run_record(run)
    folder = Path(record.path)
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if not record.path or index["format"] != "titan_attent.images":
            return None
        height, width = index["height"], index["width"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # Small images are read unscaled, to be shown in whole pixels.
    is_small = isinstance(height, int) and height == width and height <= BOX
    images = ImageDataset(folder, size=0 if is_small else BOX)
    if record.fingerprint not in (None, images.fingerprint):
        raise ValueError(
            f"{folder} has changed since the run: its fingerprint was {record.fingerprint} then and is "
            f"{images.fingerprint} now. Restore the data set of the run to see its images"
        )
    return images


def count_visits(trace: Path, num_images: int, notes: list[str] | None = None) -> tuple[np.ndarray, int]:
    """How often each image was trained, int64 [num_images], and the number of steps."""
    visits, num_steps = np.zeros(num_images, np.int64), 0
    for _, ids in _lines(trace, "ids", num_images, [] if notes is None else notes):
        np.add.at(visits, ids, 1)
        num_steps += 1
    return visits, num_steps


def read_quarantined(path: Path, num_images: int, notes: list[str] | None = None) -> dict[int, int]:
    """Id -> the step at which it was quarantined, from the id's last line; in the order of the ids' first lines."""
    return {
        i: step
        for step, ids in _lines(path, "example_id", num_images, [] if notes is None else notes)
        for i in ids.tolist()
    }


def draw_trained(run: Path, images: ImageDataset, visits: np.ndarray, num_steps: int) -> Image.Image:
    """The images with the most visits and with the fewest."""
    blocks = []
    for name, order in (("most", np.argsort(-visits, kind="stable")), ("least", np.argsort(visits, kind="stable"))):
        ids = order[:MAX_TRAINED]
        counts = visits[ids].tolist()
        heading = f"trained {name} often: {len(ids)} images with {_count(max(counts), 'visit', min(counts))}"
        if name == "least" and (never := int((visits == 0).sum())):
            heading += f"; {_count(never, 'image')} never trained"
        notes = [(_count(count, "visit"), f"id {i}") for i, count in zip(ids.tolist(), counts, strict=True)]
        blocks.append((heading, _cells(images, ids, notes)))
    title = f"trained most and least often of {_count(len(visits), 'image')} in {_count(num_steps, 'step')}"
    return draw_sheet(f"{title}, {visits.mean():.3g} visits per image on average: {run}", blocks)


def draw_quarantined(run: Path, images: ImageDataset, quarantined: dict[int, int]) -> Image.Image:
    """The first images that were quarantined, each with the step from which on it is not selected."""
    ids = np.array(list(quarantined)[:MAX_QUARANTINED])
    notes = [(f"id {i}", f"step {quarantined[i]:,}") for i in ids.tolist()]
    shown = f"the first {len(ids)} of " if len(quarantined) > len(ids) else ""
    title = f"{shown}{_count(len(quarantined), 'quarantined image')}: {run}"
    return draw_sheet(title, [("", _cells(images, ids, notes))])


def _cells(images: ImageDataset, ids: np.ndarray, notes: Sequence[Sequence[str]]) -> list[Cell]:
    """One cell per image: its class, then its notes."""
    labels = images.labels(torch.from_numpy(ids)).tolist()
    return [
        Cell(images.thumbnail(i), [images.classes[label], *lines])
        for i, label, lines in zip(ids.tolist(), labels, notes, strict=True)
    ]


def _count(number: int, name: str, start: int | None = None) -> str:
    """A number of things, as "3 visits", or a range from ``start``, as "1 to 3 visits"."""
    first = "" if start in (None, number) else f"{start:,} to "
    return f"{first}{number:,} {name}{'s' * (number != 1)}"


def _lines(path: Path, key: str, num_images: int, notes: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """The step of each line and its ids under ``key``, int64 [n].

    Lines that the teacher did not write are left out and noted. ValueError at an id that the data set does not have.
    """

    def parse(record: Any) -> tuple[int, np.ndarray]:
        return step_of(record), np.array(record[key], np.int64).reshape(-1)

    for step, ids in json_lines(path, parse, "a record of the teacher", notes):
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_images:
            raise ValueError(
                f"{path}, step {step} names an image beyond the {num_images:,} of the data set, so the run was trained "
                "on another data set: restore that one, or move the file away"
            )
        yield step, ids
