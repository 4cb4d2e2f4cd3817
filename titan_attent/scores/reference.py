"""Reference losses: what a second model finds hard in every example, for the importance "excess_loss".

The loss of a reference model estimates the part of an example's loss that no training removes; loss - reference loss
is then the part worth teaching. titan_attent.score computes the losses once, with writer.py; every run on the same
examples reads them.

    DIR/losses.bin        float32 little-endian [N]: mean nats per token of example i; it grows in the order of the ids
    DIR/scoring.json      while unfinished: what is being scored, and how many losses are there for good
    DIR/reference.json    what was scored, by what, which loss, sha256 of losses.bin; written last: with it DIR is a
                          reference

The losses on disk are always a prefix of all losses, and nothing in the files names a rank: a killed scoring loses
what was not written yet, and any number of ranks can go on. Neither torchtitan nor a process group is needed here.

Cost: 4 bytes per example on disk, written and hashed once; reading is a positioned read.
Source: excess loss as in RHO-LOSS (https://arxiv.org/abs/2206.07137) and Rho-1 (https://arxiv.org/abs/2404.07965).
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.io.files import HASH_BLOCK
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object, read_versioned

FORMAT = "titan_attent.reference"
VERSION = 1
REFERENCE_FILE = "reference.json"
LOSSES_FILE = "losses.bin"
SCORING_FILE = "scoring.json"
COST_FILE = "cost.json"
"""Beside the losses that `titan_attent.score pair` wrote: the cost of its half of the work."""
PARTS_FOLDER = "parts"
"""Where earlier versions of this package kept an unfinished scoring."""
SCORER = "`torchrun -m titan_attent.score`"

AMATEUR, EXPERT = "amateur", "expert"
ROLES = (AMATEUR, EXPERT)
CROSS_ENTROPY = "cross-entropy"
"""The loss of every model of text: mean nats per token."""
OF_IMAGES = ("vit_attent", "mae_attent")
"""Models whose loss depends on ``[vision]``."""

DTYPE = np.dtype("<f4")


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
    loss: str = ""
    """Which loss, with what changes its value; empty where it was not recorded."""
    role: str = ""
    """What the model is to the data: one of ``ROLES``; empty where nobody said so."""

    def __post_init__(self) -> None:
        bad = [name for name in ("seq_len", "num_examples") if getattr(self, name) < 1]
        bad += ["role"] if self.role and self.role not in ROLES else []
        if bad:
            raise ValueError(", ".join(f"{name} is {getattr(self, name)!r}" for name in bad))

    def stated(self) -> dict[str, Any]:
        """The fields as files keep them: without those that nobody stated."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("loss", "role")}


def read_json(path: Path, *, mend: str) -> dict[str, Any]:
    """The fields of a file of this format and version, without those two; ValueError if it is none."""
    return read_versioned(path, format=FORMAT, versions=(VERSION,), mend=mend)


def with_inferred_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file of before, which names neither loss nor role, with those that follow from the others.

    A model of text has one loss. The two scorers of `titan_attent.score pair` are known by the folders of their models,
    or by the data that they have counted.
    """
    model, checkpoint = str(stored.get("model")), str(stored.get("checkpoint"))
    found = {}
    if "loss" not in stored and not model.startswith(OF_IMAGES):
        found["loss"] = CROSS_ENTROPY
    if "role" not in stored:
        parts = Path(checkpoint).parts
        if model == "bigram":
            found["role"] = EXPERT if parts[-2:] == ("trusted", "train") else AMATEUR
        elif len(parts) > 3 and parts[-4] == "models" and parts[-3] in ROLES:  # models/amateur/checkpoint/step-300
            found["role"] = parts[-3]
    return stored | found


class ReferenceLosses:
    """The finished losses of a model in a folder: a reference, which is an expert or an amateur. Picklable.

    Attributes:
        scoring: what they are of.
        loss, role: of the scoring, or what follows from a file of before; empty where nothing does.
        sha256: of the losses, as the folder says.
        device_seconds: what making them took, on all devices; 0 where the folder does not tell.

    Raises:
        ValueError: the folder or a file is missing, unfinished, malformed, of another format, or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._losses, file = self.path / LOSSES_FILE, self.path / REFERENCE_FILE
        mend = f"copy the folder again, or delete it and score again with {SCORER}"
        if not file.is_file():
            raise ValueError(f"{self.path}: {_why_no_reference(self.path)}")
        content = read_json(file, mend=mend)
        try:
            self.sha256 = typed(str, content.pop("sha256"), where="sha256")
            self.scoring = typed(Scoring, content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: malformed ({error}); {mend}") from error
        known = with_inferred_fields(content)
        self.loss, self.role = known.get("loss", ""), known.get("role", "")
        self.num_examples = self.scoring.num_examples
        self.device_seconds = _device_seconds(self.path / COST_FILE)
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
        """The losses of examples [start, stop), fp32 [stop - start]; IndexError if there are no such examples.

        Raises:
            ValueError: the file was truncated since it was opened, or a loss is not finite.
        """
        if not 0 <= start <= stop <= self.num_examples:
            raise IndexError(f"{self.path}: examples [{start}, {stop}) are outside [0, {self.num_examples})")
        losses = np.fromfile(self._losses, dtype=DTYPE, count=stop - start, offset=start * DTYPE.itemsize)
        if len(losses) < stop - start:
            raise ValueError(
                f"{self._losses}: ends before example {stop} of {self.num_examples}: truncated or replaced; copy the "
                f"folder again, or delete it and score again with {SCORER}"
            )
        if not np.isfinite(losses).all():
            raise ValueError(self._not_finite())
        return torch.from_numpy(losses.astype(np.float32))

    def check_finite(self, start: int, stop: int) -> None:
        """ValueError if a loss of examples [start, stop) is not finite: NaN would be taught before all others."""
        step = HASH_BLOCK // DTYPE.itemsize
        for first in range(start, stop, step):
            self.read(first, min(first + step, stop))

    def _not_finite(self) -> str:
        """How many of all losses are not finite, and which first: one pass over the file, where it is damaged."""
        num, first = 0, list[int]()
        step = HASH_BLOCK // DTYPE.itemsize
        for start in range(0, self.num_examples, step):
            block = np.fromfile(self._losses, dtype=DTYPE, count=step, offset=start * DTYPE.itemsize)
            bad = np.flatnonzero(~np.isfinite(block))
            num += len(bad)
            first += (bad[:5] + start).tolist()
        return (
            f"{self._losses}: {num} of the {self.num_examples} losses are not finite, the first of examples "
            f"{', '.join(map(str, first[:5]))}: nothing can be chosen by them. The file is damaged or was not written "
            f"by this package: copy the folder again, or delete it and score again with {SCORER}"
        )

    def verify_checksum(self) -> None:
        """Re-hash the losses, at about 1 GB/s; ValueError if they are not those that were written."""
        sha256 = hashlib.sha256()
        with open(self._losses, "rb") as file:
            while block := file.read(HASH_BLOCK):
                sha256.update(block)
        if sha256.hexdigest() != self.sha256:
            raise ValueError(
                f"{self._losses}: its sha256 is {sha256.hexdigest()} where {REFERENCE_FILE} says {self.sha256}: the "
                f"file is damaged; copy the folder again, or delete it and score again with {SCORER}"
            )


def _device_seconds(file: Path) -> float:
    if not file.is_file():
        return 0.0
    try:
        seconds = typed(float, read_json_object(file)["device_seconds"], where="device_seconds")
        if seconds < 0:
            raise ValueError(f"device_seconds is {seconds}")
        return seconds
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: malformed ({error}); remove it, and its cost is not charged") from error


def earlier_version_problem(folder: Path) -> str:
    """Why an unfinished scoring of an earlier version of this package is of no use here, and the mend."""
    return (
        f"holds an interrupted scoring of an earlier version of this package, in {PARTS_FOLDER}; finish it with that "
        f"version, or delete {folder / PARTS_FOLDER} and score anew with {SCORER}"
    )


def _why_no_reference(folder: Path) -> str:
    if (folder / PARTS_FOLDER).is_dir():
        return earlier_version_problem(folder)
    if (folder / SCORING_FILE).exists():
        return f"its scoring was interrupted; run the same {SCORER} command again, which resumes it"
    what = f"no {REFERENCE_FILE} in it" if folder.is_dir() else "no such folder"
    return f"not a folder of reference losses, {what}; correct the path, or write one with {SCORER}"
