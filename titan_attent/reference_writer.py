"""Writes the reference losses of reference.py: part by part, resumable, finished by one small file.

Cost: 4 bytes an example on disk, written twice and hashed once.
"""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from titan_attent.data.format import PROGRESS_FILE, write_atomically
from titan_attent.data.progress import locked
from titan_attent.reference import (
    DTYPE,
    FORMAT,
    LOSSES_FILE,
    PARTS_FOLDER,
    REFERENCE_FILE,
    VERSION,
    Scoring,
    read_json,
)

PART_SIZE = 4096
"""Examples of a part: what a killed scoring loses, against one small file and one gather."""


class ReferenceWriter:
    """Writes reference losses part by part, or goes on with those of a killed scoring.

    Making one only looks, so that every rank may; it becomes the writer as a context manager, in one process:

        writer = ReferenceWriter(folder, scoring=scoring)
        with writer:
            for part in writer.missing():
                writer.write_part(part, losses)  # of the examples range(*writer.range_of(part))
            writer.finish()

    Raises:
        ValueError: the folder is finished, or was begun with another scoring or part size.
    """

    def __init__(self, path: str | os.PathLike[str], *, scoring: Scoring, part_size: int = PART_SIZE):
        self.path, self.scoring, self.part_size = Path(path), scoring, part_size
        self.num_parts = -(-scoring.num_examples // part_size)
        self._parts = self.path / PARTS_FOLDER
        self._stack = ExitStack()
        self._check_free()

    def _check_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: is a file; choose another folder for teacher.reference_path")
        if (self.path / REFERENCE_FILE).exists():
            raise ValueError(
                f"{self.path}: holds a finished reference; choose another teacher.reference_path, or delete it first"
            )
        if not any(self._parts.glob("part-*.bin")):
            return  # A mistaken command that wrote nothing must not stand in the way of the right one.
        stored = read_json(self._parts / PROGRESS_FILE, mend=f"delete {self._parts} to start anew")
        differing = [
            f"{name} was {stored.get(name)!r} and is {now!r}"
            for name, now in self._progress().items()
            if name != "checkpoint" and stored.get(name) != now
        ]
        if differing:
            raise ValueError(
                f"{self.path}: holds an interrupted scoring of something else: {'; '.join(differing)}. Use the same "
                f"data, model and checkpoint to resume it, or delete {self._parts} to start anew"
            )

    def _progress(self) -> dict[str, Any]:
        return {**asdict(self.scoring), "part_size": self.part_size}

    def _part(self, part: int) -> Path:
        return self._parts / f"part-{part:05d}.bin"

    def __enter__(self) -> "ReferenceWriter":
        self._parts.mkdir(parents=True, exist_ok=True)
        try:
            self._stack.enter_context(locked(self._parts))
        except ValueError as error:
            raise ValueError(
                f"{self.path}: another scoring is at work there; wait for it, or choose another teacher.reference_path"
            ) from error
        self._check_free()  # again, now that nobody else can change it
        write_atomically(self._parts / PROGRESS_FILE, _json(self._progress()))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def range_of(self, part: int) -> tuple[int, int]:
        """The ids [start, stop) of a part; only the last is shorter than ``part_size``."""
        start = part * self.part_size
        return start, min(start + self.part_size, self.scoring.num_examples)

    def missing(self) -> list[int]:
        """The parts still to be scored, in order; a damaged one among them."""

        def scored(part: int) -> bool:
            (start, stop), path = self.range_of(part), self._part(part)
            return path.is_file() and path.stat().st_size == (stop - start) * DTYPE.itemsize

        return [part for part in range(self.num_parts) if not scored(part)]

    def write_part(self, part: int, losses: Tensor) -> None:
        """Write the losses of a part, a float tensor [stop - start] on any device; whole or not at all."""
        start, stop = self.range_of(part)
        assert losses.shape == (stop - start,)
        write_atomically(self._part(part), losses.cpu().numpy().astype(DTYPE).tobytes())

    def finish(self) -> None:
        """Join the parts to a reference; ValueError, and the parts stay, if a loss is not finite."""
        assert not self.missing()
        self._check_finite()
        sha256 = hashlib.sha256()
        # No rename: the file means nothing before reference.json, and starts anew when that is not reached.
        with open(self.path / LOSSES_FILE, "wb") as file:
            for part in range(self.num_parts):
                data = self._part(part).read_bytes()
                file.write(data)
                sha256.update(data)
            file.flush()
            os.fsync(file.fileno())
        write_atomically(self.path / REFERENCE_FILE, _json({**asdict(self.scoring), "sha256": sha256.hexdigest()}))
        shutil.rmtree(self._parts)

    def _check_finite(self) -> None:
        count = 0
        first: list[int] = []
        for part in range(self.num_parts):
            bad = np.flatnonzero(~np.isfinite(np.fromfile(self._part(part), dtype=DTYPE)))
            count += len(bad)
            first += (bad[: 5 - len(first)] + self.range_of(part)[0]).tolist()
        if count:
            raise ValueError(
                f"{self.path}: {count} of {self.scoring.num_examples} losses are not finite, the first of examples "
                f"{', '.join(map(str, first))}: the weights in {self.scoring.checkpoint} are broken, or overflow in "
                f"this precision. Delete {self._parts} and score with another checkpoint, or with "
                'training.mixed_precision_param = "float32"'
            )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1) + "\n").encode("ascii")
