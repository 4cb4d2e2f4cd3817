"""The losses of one scorer, an expert or an amateur, on every example; several importances read them.

The loss of a trained model estimates the part of an example's loss that no training removes, so loss - expert's loss is
the part that can still be learned. titan_attent.score computes the losses once, with writer.py; every run on the same
examples reads them.

    DIR/losses.bin        float32 little-endian [N]: mean nats per token of example i; it grows in the order of the ids
    DIR/scoring.json      while unfinished: what is being scored, and how many losses are durably written
    DIR/reference.json    the data, the model, which loss, and the sha256 of losses.bin; written last, and a folder
                          without it is not finished

The losses on disk are always a prefix of all losses, and the files do not depend on ranks. A killed scoring loses only
the losses that were not written yet, and any number of ranks can resume it. This module needs neither torchtitan nor a
process group.

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

from titan_attent.data.examples import Examples, ScoredData
from titan_attent.data.io.files import HASH_BLOCK
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object, read_versioned

FORMAT = "titan_attent.reference"
VERSION = 1
SCORES_FILE = "reference.json"
LOSSES_FILE = "losses.bin"
SCORING_FILE = "scoring.json"
COST_FILE = "cost.json"
"""File next to the losses that `titan_attent.score pair` wrote: the cost of one of the two models."""
PARTS_FOLDER = "parts"
"""Where earlier versions of this package stored an unfinished scoring."""
SCORER = "`torchrun -m titan_attent.score pair` (or `checkpoint`)"

AMATEUR, EXPERT = "amateur", "expert"
ROLES = (AMATEUR, EXPERT)
CROSS_ENTROPY = "cross-entropy"
"""The loss of every model of text: mean nats per token."""
OF_IMAGES = ("vit_attent", "mae_attent")
"""Models whose loss depends on ``[vision]``."""

DTYPE = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Everything that determines the losses; ``checkpoint`` is only informative, since a checkpoint may be moved."""

    data_fingerprint: str
    seq_len: int
    num_examples: int
    model: str
    """Name and flavor of the scorer."""
    precision: str
    """Precision of its computation, such as bfloat16: losses differ in the fourth digit."""
    checkpoint: str
    """Folder of its weights."""
    checkpoint_sha256: str
    """Hash of the checkpoint's ``.metadata``, which differs between any two saves."""
    loss: str = ""
    """Name of the loss, with the settings that change its value; empty if it was not recorded."""
    role: str = ""
    """Role of the model: one of ``ROLES``; empty if it was not stated."""

    def __post_init__(self) -> None:
        bad = [name for name, minimum in (("seq_len", 0), ("num_examples", 1)) if getattr(self, name) < minimum]
        bad += ["role"] if self.role and self.role not in ROLES else []
        if bad:
            raise ValueError(", ".join(f"{name} is {getattr(self, name)!r}" for name in bad))

    def stated(self) -> dict[str, Any]:
        """The fields as files store them: without a loss or a role that is empty."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("loss", "role")}


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """The fields of a file of scores, without format and version. ValueError with ``fix`` if it is not such a file."""
    return read_versioned(path, format=FORMAT, versions=(VERSION,), fix=fix)


def with_inferred_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Add loss and role to the fields of a file of an earlier version, if they follow from the other fields.

    A model of text has only one possible loss. The two scorers of `titan_attent.score pair` are recognised by the
    folders of their models, or by the data that they counted.
    """
    model, checkpoint = str(stored.get("model")), str(stored.get("checkpoint"))
    inferred = {}
    if "loss" not in stored and not model.startswith(OF_IMAGES):
        inferred["loss"] = CROSS_ENTROPY
    if "role" not in stored:
        parts = Path(checkpoint).parts
        if model == "bigram":
            inferred["role"] = EXPERT if parts[-2:] == ("trusted", "train") else AMATEUR
        elif len(parts) > 3 and parts[-4] == "models" and parts[-3] in ROLES:  # models/amateur/checkpoint/step-300
            inferred["role"] = parts[-3]
    return stored | inferred


class StoredScores:
    """The finished losses of one scorer, an expert or an amateur, in a folder. Picklable.

    Attributes:
        scoring: the data and the model.
        loss, role: from the file, or inferred for a file of an earlier version; empty if unknown.
        sha256: hash of the losses, from the file.
        device_seconds: cost of computing them, on all devices; 0 if the folder does not say.

    Raises:
        ValueError: the folder or a file is missing, unfinished, malformed, of another format, or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._losses, file = self.path / LOSSES_FILE, self.path / SCORES_FILE
        fix = f"copy the folder again, or delete it and score again with {SCORER}"
        if not file.is_file():
            raise ValueError(f"{self.path}: {_why_no_scores(self.path)}")
        content = read_json(file, fix=fix)
        try:
            self.sha256 = typed(str, content.pop("sha256"), where="sha256")
            self.scoring = typed(Scoring, content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: malformed ({error}); {fix}") from error
        fields = with_inferred_fields(content)
        self.loss, self.role = fields.get("loss", ""), fields.get("role", "")
        self.num_examples = self.scoring.num_examples
        self.device_seconds = _device_seconds(self.path / COST_FILE)
        if not self._losses.is_file():
            raise ValueError(f"{self._losses}: this file is missing; {fix}")
        actual, expected = self._losses.stat().st_size, self.num_examples * DTYPE.itemsize
        if actual != expected:
            raise ValueError(f"{self._losses}: has {actual} bytes instead of {expected}: truncated or replaced; {fix}")

    def check(self, data: ScoredData) -> None:
        """Raise a ValueError that names every difference if these are not the losses of that data."""
        current = data._asdict()
        differing = [
            f"{name} is {value!r} in this run and {stored!r} in the folder"
            for name, value in current.items()
            if (stored := getattr(self.scoring, name)) != value
        ]
        if differing:
            raise ValueError(
                f"{self.path}: holds the scores of other examples: {'; '.join(differing)}. Score this data into "
                f"another folder with {SCORER}, or train on the data and seq_len that were scored"
            )

    def read(self, start: int, stop: int) -> Tensor:
        """The losses of examples [start, stop), fp32 [stop - start]; IndexError if there are no such examples.

        Raises:
            ValueError: the file was truncated after it was opened, or a loss is not finite.
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

    def read_for(self, dataset: Examples, start: int, stop: int) -> Tensor:
        """The losses of examples [start, stop) of a run, fp32 [stop - start]; a span has the loss of its document.

        Raises:
            ValueError: a reason of :meth:`read`.
        """
        if not isinstance(dataset, DocumentDataset) or start == stop:
            return self.read(start, stop)
        documents = torch.from_numpy(dataset.documents_of(np.arange(start, stop)))
        first = int(documents[0])
        return self.read(first, int(documents[-1]) + 1)[documents - first]

    def check_finite(self, start: int, stop: int) -> None:
        """ValueError if a loss of examples [start, stop) is not finite: examples with NaN would be selected first."""
        step = HASH_BLOCK // DTYPE.itemsize
        for first in range(start, stop, step):
            self.read(first, min(first + step, stop))

    def _not_finite(self) -> str:
        """The message with the number of losses that are not finite, and the first of them. Reads the whole file."""
        num, first = 0, list[int]()
        step = HASH_BLOCK // DTYPE.itemsize
        for start in range(0, self.num_examples, step):
            block = np.fromfile(self._losses, dtype=DTYPE, count=step, offset=start * DTYPE.itemsize)
            bad = np.flatnonzero(~np.isfinite(block))
            num += len(bad)
            first += (bad[:5] + start).tolist()
        return (
            f"{self._losses}: {num} of the {self.num_examples} losses are not finite, first those of examples "
            f"{', '.join(map(str, first[:5]))}: examples cannot be selected by them. The file is damaged or was not "
            f"written by this package: copy the folder again, or delete it and score again with {SCORER}"
        )

    def verify_checksum(self) -> None:
        """Hash the losses again, at about 1 GB/s; ValueError if they have changed since they were written."""
        sha256 = hashlib.sha256()
        with open(self._losses, "rb") as file:
            while block := file.read(HASH_BLOCK):
                sha256.update(block)
        if sha256.hexdigest() != self.sha256:
            raise ValueError(
                f"{self._losses}: its sha256 is {sha256.hexdigest()}, but {SCORES_FILE} says {self.sha256}: the "
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
        raise ValueError(f"{file}: malformed ({error}); remove it to leave its cost out of the ledger") from error


def earlier_version_problem(folder: Path) -> str:
    """The message that an unfinished scoring of an earlier version cannot be resumed, and how to fix it."""
    return (
        f"holds an interrupted scoring of an earlier version of this package, in {PARTS_FOLDER}; finish it with that "
        f"version, or delete {folder / PARTS_FOLDER} and score again with {SCORER}"
    )


def _why_no_scores(folder: Path) -> str:
    if (folder / PARTS_FOLDER).is_dir():
        return earlier_version_problem(folder)
    if (folder / SCORING_FILE).exists():
        return f"its scoring was interrupted; run the same {SCORER} command again, which resumes it"
    problem = f"no {SCORES_FILE} in it" if folder.is_dir() else "no such folder"
    return f"not a folder of scores, {problem}; correct the path, or write one with {SCORER}"
