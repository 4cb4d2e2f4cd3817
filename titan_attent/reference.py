"""Reference losses: what a second model finds hard in every example, for the importance "excess_loss".

The loss of a reference model estimates the part of an example's loss that no training removes; loss - reference loss
is then the part worth teaching. The losses are made once, by score.py, and read by every run on the same examples.

    DIR/losses.bin             float32 little-endian [N]: mean nats a token of example i
    DIR/reference.json         what was scored, by what, sha256 of losses.bin; written last: with it DIR is a reference
    DIR/parts/progress.json    while unfinished: what is being scored, and the size of a part
    DIR/parts/part-00000.bin   while unfinished: the losses of examples [0, part_size), and so on

A part appears whole or not at all and knows nothing of ranks: a killed scoring loses the part under way, and any
number of ranks can go on. Neither torchtitan nor a process group is needed here.

Cost: 4 bytes an example on disk, written twice and hashed once; reading is a copy out of a memory map.
Source: excess loss as in RHO-LOSS (https://arxiv.org/abs/2206.07137) and Rho-1 (https://arxiv.org/abs/2404.07965).
"""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.format import PROGRESS_FILE, write_atomically
from titan_attent.data.progress import locked

FORMAT = "titan_attent.reference"
VERSION = 1
REFERENCE_FILE = "reference.json"
LOSSES_FILE = "losses.bin"
PARTS_FOLDER = "parts"
PART_SIZE = 4096
"""Examples of a part: what a killed scoring loses, against one small file and one gather."""
SCORER = "`torchrun -m titan_attent.score`"

DTYPE = np.dtype("<f4")
HASH_BLOCK = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What decides reference losses; ``checkpoint`` alone is for people, since a checkpoint may be moved."""

    data_fingerprint: str
    seq_len: int
    num_examples: int
    model: str
    """Name and flavor of the reference model."""
    precision: str
    """In which it computes, such as bfloat16: its losses differ in the fourth digit."""
    checkpoint: str
    """Folder of its weights."""
    checkpoint_sha256: str
    """Of the checkpoint's ``.metadata``, which is another at every save."""

    def __post_init__(self) -> None:
        # mypy does not know that annotations are types here; what a file says is not trusted to be one.
        good = all(isinstance(getattr(self, field.name), field.type) for field in fields(self))  # type: ignore[arg-type]
        if not good or self.seq_len < 1 or self.num_examples < 1:
            raise ValueError(f"{self}")


def _read_json(path: Path, *, mend: str) -> dict[str, Any]:
    """The fields of a file of this format and version, without those two; ValueError if it is none."""
    try:
        content = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file with a JSON object in it ({error}); {mend}") from error
    found = content.pop("format", None), content.pop("version", None)
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path}: format {found[0]!r} version {found[1]!r}, but this package reads {FORMAT!r} version {VERSION}; "
            f"use the package version that wrote it, or {mend}"
        )
    return content


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1) + "\n").encode("ascii")


class ReferenceLosses:
    """The finished reference losses of a folder; ``scoring`` says what they are of. Picklable.

    Raises:
        ValueError: the folder or a file is missing, unfinished, malformed, of another format, or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._losses, file = self.path / LOSSES_FILE, self.path / REFERENCE_FILE
        mend = f"copy the folder again, or delete it and score again with {SCORER}"
        if not file.is_file():
            raise ValueError(f"{self.path}: {_why_no_reference(self.path)}")
        content = _read_json(file, mend=mend)
        try:
            self._sha256 = content.pop("sha256")
            self.scoring = Scoring(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: malformed ({error}); {mend}") from error
        self.num_examples = self.scoring.num_examples
        if not self._losses.is_file():
            raise ValueError(f"{self._losses}: this file is missing; {mend}")
        actual, expected = self._losses.stat().st_size, self.num_examples * DTYPE.itemsize
        if actual != expected:
            raise ValueError(f"{self._losses}: has {actual} bytes instead of {expected}: truncated or replaced; {mend}")

    def check(self, *, fingerprint: str, seq_len: int, num_examples: int) -> None:
        """Raise a ValueError that names every difference if these are not the losses of that data."""
        current = {"data_fingerprint": fingerprint, "seq_len": seq_len, "num_examples": num_examples}
        differing = [
            f"{name} is {now!r} now and {there!r} there"
            for name, now in current.items()
            if (there := getattr(self.scoring, name)) != now
        ]
        if differing:
            raise ValueError(
                f"{self.path}: holds the reference losses of other examples: {'; '.join(differing)}. Score this data "
                f"into another folder with {SCORER}, or train on the data and seq_len that were scored"
            )

    def read(self, start: int, stop: int) -> Tensor:
        """The losses of examples [start, stop), fp32 [stop - start]; IndexError if not all are there."""
        if not 0 <= start <= stop <= self.num_examples:
            raise IndexError(f"{self.path}: examples [{start}, {stop}) are outside [0, {self.num_examples})")
        # Mapped anew at each call: there is one call a run, and an object without a map can be pickled.
        losses = np.memmap(self._losses, dtype=DTYPE, mode="r")
        return torch.from_numpy(losses[start:stop].astype(np.float32))

    def verify_checksum(self) -> None:
        """Re-hash the losses, at about 1 GB/s; ValueError if they are not those that were written."""
        sha256 = hashlib.sha256()
        with open(self._losses, "rb") as file:
            while block := file.read(HASH_BLOCK):
                sha256.update(block)
        if sha256.hexdigest() != self._sha256:
            raise ValueError(
                f"{self._losses}: its sha256 is {sha256.hexdigest()} where {REFERENCE_FILE} says {self._sha256}: the "
                f"file is damaged; copy the folder again, or delete it and score again with {SCORER}"
            )


def _why_no_reference(folder: Path) -> str:
    if (folder / PARTS_FOLDER / PROGRESS_FILE).exists():
        return f"its scoring was interrupted; run the same {SCORER} command again, which resumes it"
    what = f"no {REFERENCE_FILE} in it" if folder.is_dir() else "no such folder"
    return f"not a folder of reference losses, {what}; correct the path, or write one with {SCORER}"


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
        stored = _read_json(self._parts / PROGRESS_FILE, mend=f"delete {self._parts} to start anew")
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
