"""Targets of distillation on disk: of every token of a data set a few ids from one checkpoint of a source.

    DIR/step-N/targets.bin      a record per token, example after example: int32 little-endian [N] ids, and for top_k
                                float16 [N] probabilities
    DIR/step-N/progress.json    while unfinished: what is being written, and how many examples are durable
    DIR/step-N/targets.json     the same facts; written last, and a folder without it is not finished

The source runs once; any number of students and passes read its targets by (checkpoint, example id). The durable
examples are always a prefix, and the files do not depend on ranks, so a killed command is resumed on any number of
them. Every rank writes its own rows in place: the folder must be on a file system that all nodes share.

A window has ``seq_len`` records. A document's example, which is shorter, has one for each of its pairs of a token and
the next. Records are numbered as the pairs are (data/text/document_examples.py), so an example that is packed somewhere
in a row, or cut between two rows, finds its own. Folders of versions 1 (windows) and 2 (documents) of the format are
read, too: they lack the number of ids.

Cost: 4 N bytes per token on disk (128 for 32 draws, 4 for argmax, 6 N for top_k), written once; a read per example.
Source: sparse logit sampling (arXiv 2503.16870).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.files import OpenFiles
from titan_attent.data.io.folder import locked
from titan_attent.data.text.document_examples import DOCUMENT, DocumentDataset, PairPlaces
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned

FORMAT, VERSION, OLDER_VERSIONS = "titan_attent.targets", 3, (1, 2)
DATA_FILE, PROGRESS_FILE, FACTS_FILE = "targets.bin", "progress.json", "targets.json"
DRAWS, TOP_K, ARGMAX = "draws", "top_k", "argmax"
KINDS = (DRAWS, TOP_K, ARGMAX)
WINDOW = "window"
COMMAND = "`torchrun -m titan_attent.score targets`"


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """Everything that determines the targets; ``checkpoint`` is only informative, since a checkpoint may be moved."""

    data_fingerprint: str
    seq_len: int
    num_examples: int
    tokenizer: str
    """Number of ids and the start of the hash of the tokenizer."""
    model: str
    precision: str
    checkpoint: str
    checkpoint_sha256: str
    """Hash of the checkpoint's ``.metadata``, which differs between any two saves."""
    kind: str
    num: int
    """Ids per token, N."""
    temperature: float
    """0 for argmax."""
    seed: int
    unit: str = WINDOW
    """The value of ``[data] unit``."""
    num_pairs: int = 0
    """Pairs of all documents; 0 for windows, which have ``seq_len`` each."""
    num_ids: int = 0
    """Token ids that the checkpoint's model has, and so an upper bound of those that are stored; 0 for unknown."""

    def __post_init__(self) -> None:
        sizes = (self.seq_len, self.num_examples, self.num, *([self.num_pairs] if self.unit == DOCUMENT else []))
        if self.kind not in KINDS or self.unit not in (WINDOW, DOCUMENT) or min(sizes) < 1:
            raise ValueError(
                f"kind {self.kind!r}, unit {self.unit!r}, {self.num} ids, {self.num_examples} examples of "
                f"{self.seq_len}, {self.num_pairs} pairs"
            )

    @property
    def record(self) -> np.dtype:
        """The record of a token."""
        fields: list[Any] = [("ids", "<i4", (self.num,))]
        return np.dtype(fields + ([("probabilities", "<f2", (self.num,))] if self.kind == TOP_K else []))

    @property
    def num_records(self) -> int:
        return self.num_pairs if self.unit == DOCUMENT else self.num_examples * self.seq_len


def facts_of_data(dataset: TokenDataset | DocumentDataset) -> dict[str, Any]:
    """The facts that depend on the data alone. Reads no document."""
    info = dataset.shards.tokenizer_info
    facts = {"tokenizer": f"{info['vocab_size']} ids, {str(info.get('sha256', ''))[:16]}"}
    if isinstance(dataset, TokenDataset):
        return {"unit": WINDOW, **dataset.scored._asdict(), **facts}
    sizes = {"seq_len": dataset.seq_len, "num_examples": len(dataset), "num_pairs": dataset.num_pairs}
    return {"unit": DOCUMENT, "data_fingerprint": dataset.stored.fingerprint, **sizes, **facts}


def window_places(example_ids: Tensor, *, seq_len: int) -> PairPlaces:
    """Where the pairs of windows int64 [B] are, in rows of ``seq_len`` and among all pairs; a span per window."""
    ids = example_ids.numpy()
    return PairPlaces(np.arange(len(ids)), np.zeros_like(ids), ids * seq_len, np.full_like(ids, seq_len))


def _encode(facts: TargetFacts, **progress: int) -> bytes:
    """The content of a file of facts."""
    return encode_versioned(asdict(facts) | progress, format=FORMAT, version=VERSION)


def _read_facts(path: Path) -> tuple[TargetFacts, dict[str, Any]]:
    """The facts in a file, and its other fields; ValueError if it is malformed."""
    fix = f"delete {path.parent} and write it again with {COMMAND}"
    content = read_versioned(path, format=FORMAT, versions=(*OLDER_VERSIONS, VERSION), fix=fix)
    rest: dict[str, Any] = {
        name: content.pop(name) for name in ("num_written", "num_records_written") if name in content
    }
    try:
        return typed(TargetFacts, content), rest
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: malformed ({error}); {fix}") from error


class StoredTargets:
    """The finished targets of one checkpoint. Picklable, and safe on any thread.

    Raises:
        ValueError: the folder is missing, unfinished, malformed, of another format, or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not (self.path / FACTS_FILE).is_file():
            unfinished = (self.path / PROGRESS_FILE).is_file()
            why = (
                "they are unfinished; run the same command again, which resumes it" if unfinished else "none are there"
            )
            raise ValueError(f"{self.path}: no targets, {why}; write them with {COMMAND}")
        self.facts, _ = _read_facts(self.path / FACTS_FILE)
        expected = self.facts.num_records * self.facts.record.itemsize
        data = self.path / DATA_FILE
        actual = data.stat().st_size if data.is_file() else -1
        if actual != expected:
            raise ValueError(
                f"{data}: has {actual} bytes instead of {expected}: missing, truncated or replaced; copy the folder "
                f"again, or delete it and write it with {COMMAND}"
            )
        self._files = OpenFiles(self.path)

    def check(self, data: Mapping[str, Any]) -> None:
        """Raise a ValueError that names every difference if these are not the targets of that data.

        Args:
            data: from :func:`facts_of_data`.
        """
        differing = [
            f"{name} is {value!r} in this run and {getattr(self.facts, name)!r} in the folder"
            for name, value in data.items()
            if getattr(self.facts, name) != value
        ]
        if differing:
            raise ValueError(
                f"{self.path}: holds the targets of other examples: {'; '.join(differing)}. Write those of this data "
                f"into another folder with {COMMAND}, or train on the data, unit and seq_len that they were written for"
            )

    def read(self, example_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`read_places` of whole windows, int64 [B] -> [B, L, N]. IndexError outside [0, num_examples)."""
        facts, shape = self.facts, (len(example_ids), self.facts.seq_len)
        for i in example_ids.tolist():
            if not 0 <= i < facts.num_examples:
                raise IndexError(f"{self.path}: example id {i} is outside [0, {facts.num_examples})")
        return self.read_places(window_places(example_ids, seq_len=facts.seq_len), shape=shape)

    def read_places(self, places: PairPlaces, *, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The targets of a batch: ids, int32 [B, L, N], and for top_k weights that sum to 1, fp32 [B, L, N].

        Both are 0 where the batch has no pair.

        Args:
            places: spans of at least one pair.
            shape: B, L.
        """
        facts = self.facts
        records = np.zeros(shape, dtype=facts.record)
        content, size = records.reshape(-1).view(np.uint8).data, facts.record.itemsize
        slots = places.rows * shape[1] + places.columns
        for slot, first, length in zip(slots.tolist(), places.firsts.tolist(), places.lengths.tolist(), strict=True):
            part = content[slot * size : (slot + length) * size]
            self._files.read_into(part, name=DATA_FILE, offset=first * size)
        ids = torch.from_numpy(np.ascontiguousarray(records["ids"]).astype(np.int32, copy=False))
        if facts.kind != TOP_K:
            return ids, None
        weights = torch.from_numpy(records["probabilities"].astype(np.float32))
        sums = weights.sum(dim=-1, keepdim=True)
        return ids, weights / torch.where(sums > 0, sums, 1.0)


class TargetsWriter:
    """Writes the targets of one checkpoint, or resumes a killed writing.

    One process enters it as a context manager, which prepares the folder and locks it. Then every rank calls
    :meth:`write` for its rows; when all ranks have written the examples before ``stop``, that process calls
    :meth:`durable` with it.

    Attributes:
        num_written: examples whose targets are durable.
        num_records_written: their records.

    Raises:
        ValueError: the folder holds finished targets or those of another command, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, facts: TargetFacts):
        self.path, self.facts = Path(path), facts
        self._data = self.path / DATA_FILE
        self.num_written, self.num_records_written = self._num_durable()

    def _num_durable(self) -> tuple[int, int]:
        """Durable examples and records."""
        if (self.path / FACTS_FILE).exists():
            raise ValueError(f"{self.path}: holds finished targets; choose another --output, or delete it")
        progress = self.path / PROGRESS_FILE
        if not progress.exists():
            return 0, 0
        stored, rest = _read_facts(progress)
        num = rest.get("num_written")
        differing = [
            f"{name} was {getattr(stored, name)!r} and is {value!r}"
            for name, value in asdict(self.facts).items()
            if name != "checkpoint" and getattr(stored, name) != value
        ]
        if differing and num != 0:
            raise ValueError(
                f"{self.path}: holds other unfinished targets: {'; '.join(differing)}. Give the same data, model, "
                "checkpoint and options to resume them, or delete the folder"
            )
        if differing:
            return 0, 0
        if type(num) is not int or not 0 <= num <= self.facts.num_examples:
            raise ValueError(f"{progress}: malformed, num_written is {num!r}; delete {self.path} and start again")
        records = num * self.facts.seq_len if self.facts.unit == WINDOW else rest.get("num_records_written")
        if type(records) is not int or not num <= records <= self.facts.num_records:
            raise ValueError(
                f"{progress}: malformed, num_records_written is {records!r}; delete {self.path} and start again"
            )
        if num and (not self._data.is_file() or self._data.stat().st_size < records * self.facts.record.itemsize):
            raise ValueError(
                f"{self._data}: shorter than {num} examples: truncated; delete {self.path} and start again"
            )
        return num, records

    @contextmanager
    def prepared(self) -> Iterator[int]:
        """Create and lock the folder, and yield the first example without targets."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            self.num_written, self.num_records_written = self._num_durable()  # again, now under the lock
            self._save_progress()
            with open(self._data, "ab") as file:
                file.truncate(self.num_records_written * self.facts.record.itemsize)
            yield self.num_written

    def write(self, places: PairPlaces, ids: Tensor, probabilities: Tensor | None) -> None:
        """Write the targets of the pairs at ``places`` of a batch: ids [B, L, N], probabilities for top_k. On any rank.

        OSError if they cannot be written.
        """
        slots = torch.from_numpy(places.slots(ids.shape[1]))
        records = np.empty(len(slots), dtype=self.facts.record)
        records["ids"] = ids.flatten(0, 1)[slots].numpy()
        if probabilities is not None:
            records["probabilities"] = probabilities.flatten(0, 1)[slots].numpy()
        size, content = self.facts.record.itemsize, records.view(np.uint8).data
        file = os.open(self._data, os.O_WRONLY)
        try:
            for start, stop, first in _joined(places):
                _write_at(file, content[start * size : stop * size], first * size)
            os.fsync(file)
        finally:
            os.close(file)

    def durable(self, stop: int, *, num_records: int) -> None:
        """Record that all ranks have written the examples before ``stop``; finish the folder at the last one.

        Args:
            num_records: records of these examples.
        """
        self.num_written, self.num_records_written = stop, num_records
        if stop < self.facts.num_examples:
            self._save_progress()
            return
        write_atomically(self.path / FACTS_FILE, _encode(self.facts))
        (self.path / PROGRESS_FILE).unlink()

    def _save_progress(self) -> None:
        progress = {"num_written": self.num_written}
        if self.facts.unit == DOCUMENT:
            progress["num_records_written"] = self.num_records_written
        write_atomically(self.path / PROGRESS_FILE, _encode(self.facts, **progress))


def _joined(places: PairPlaces) -> Iterator[tuple[int, int, int]]:
    """(first pair, last pair + 1, counted over the spans; number in the data set) of spans that are one in the file."""
    if not len(places.firsts):
        return
    ends = np.cumsum(places.lengths)
    is_first = np.append(True, places.firsts[1:] != places.firsts[:-1] + places.lengths[:-1])
    starts = (ends - places.lengths)[is_first]
    stops = np.append(starts[1:], ends[-1])
    yield from zip(starts.tolist(), stops.tolist(), places.firsts[is_first].tolist(), strict=True)


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        done = os.pwrite(file, content, offset)
        content, offset = content[done:], offset + done
