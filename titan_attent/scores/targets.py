"""Targets of distillation on disk: of every token of a data set a few ids from one checkpoint of a source.

    DIR/step-N/targets.bin      a record per token, example after example: int32 little-endian [N] ids, and for top_k
                                float16 [N] probabilities
    DIR/step-N/progress.json    while unfinished: what is being written, and how many examples are durable
    DIR/step-N/targets.json     the same facts; written last, and a folder without it is not finished

The source runs once; any number of students and passes read its targets by (checkpoint, example id). The durable
examples are always a prefix, and the files do not depend on ranks, so a killed command is resumed on any number of
them. Every rank writes its own rows in place: the folder must be on a file system that all nodes share.

Cost: 4 N bytes per token on disk (128 for 32 draws, 4 for argmax, 6 N for top_k), written once; a read per example.
Source: sparse logit sampling (arXiv 2503.16870).
"""

import os
from collections.abc import Iterator
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
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned

FORMAT, VERSION = "titan_attent.targets", 1
DATA_FILE, PROGRESS_FILE, FACTS_FILE = "targets.bin", "progress.json", "targets.json"
DRAWS, TOP_K, ARGMAX = "draws", "top_k", "argmax"
KINDS = (DRAWS, TOP_K, ARGMAX)
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

    def __post_init__(self) -> None:
        if self.kind not in KINDS or min(self.seq_len, self.num_examples, self.num) < 1:
            raise ValueError(f"kind {self.kind!r}, {self.num} ids, {self.num_examples} examples of {self.seq_len}")

    @property
    def record(self) -> np.dtype:
        """The record of a token."""
        fields: list[Any] = [("ids", "<i4", (self.num,))]
        return np.dtype(fields + ([("probabilities", "<f2", (self.num,))] if self.kind == TOP_K else []))

    @property
    def bytes_of_example(self) -> int:
        return self.seq_len * self.record.itemsize


def tokenizer_facts(info: dict[str, Any]) -> str:
    """The tokenizer of a data set in a few words, from its index."""
    return f"{info['vocab_size']} ids, {str(info.get('sha256', ''))[:16]}"


def _read_facts(path: Path) -> tuple[TargetFacts, dict[str, Any]]:
    """The facts in a file, and its other fields; ValueError if it is malformed."""
    fix = f"delete {path.parent} and write it again with {COMMAND}"
    content = read_versioned(path, format=FORMAT, versions=(VERSION,), fix=fix)
    rest = {name: content.pop(name) for name in ("num_written",) if name in content}
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
        expected = self.facts.num_examples * self.facts.bytes_of_example
        data = self.path / DATA_FILE
        actual = data.stat().st_size if data.is_file() else -1
        if actual != expected:
            raise ValueError(
                f"{data}: has {actual} bytes instead of {expected}: missing, truncated or replaced; copy the folder "
                f"again, or delete it and write it with {COMMAND}"
            )
        self._files = OpenFiles(self.path)

    def check(self, *, data_fingerprint: str, seq_len: int, num_examples: int, tokenizer: str) -> None:
        """Raise a ValueError that names every difference if these are not the targets of that data."""
        current = {
            "data_fingerprint": data_fingerprint,
            "seq_len": seq_len,
            "num_examples": num_examples,
            "tokenizer": tokenizer,
        }
        differing = [
            f"{name} is {value!r} in this run and {getattr(self.facts, name)!r} in the folder"
            for name, value in current.items()
            if getattr(self.facts, name) != value
        ]
        if differing:
            raise ValueError(
                f"{self.path}: holds the targets of other examples: {'; '.join(differing)}. Write those of this data "
                f"into another folder with {COMMAND}, or train on the data and seq_len that they were written for"
            )

    def read(self, example_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids, int32 [B, L, N], and for top_k the weights that sum to 1, fp32 [B, L, N], of examples int64 [B].

        IndexError outside [0, num_examples).
        """
        facts = self.facts
        records = np.empty((len(example_ids), facts.seq_len), dtype=facts.record)
        for row, i in zip(records, example_ids.tolist(), strict=True):
            if not 0 <= i < facts.num_examples:
                raise IndexError(f"{self.path}: example id {i} is outside [0, {facts.num_examples})")
            buffer = row.view(np.uint8).data
            self._files.read_into(buffer, name=DATA_FILE, offset=i * facts.bytes_of_example)
        ids = torch.from_numpy(np.ascontiguousarray(records["ids"]).astype(np.int32, copy=False))
        if facts.kind != TOP_K:
            return ids, None
        weights = torch.from_numpy(records["probabilities"].astype(np.float32))
        return ids, weights / weights.sum(dim=-1, keepdim=True)


class TargetsWriter:
    """Writes the targets of one checkpoint, or resumes a killed writing.

    One process enters it as a context manager, which prepares the folder and locks it. Then every rank calls
    :meth:`write` for its rows; when all ranks have written the examples before ``stop``, that process calls
    :meth:`durable` with it.

    Attributes:
        num_written: examples whose targets are durable.

    Raises:
        ValueError: the folder holds finished targets or those of another command, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, facts: TargetFacts):
        self.path, self.facts = Path(path), facts
        self._data = self.path / DATA_FILE
        self.num_written = self._num_durable()

    def _num_durable(self) -> int:
        if (self.path / FACTS_FILE).exists():
            raise ValueError(f"{self.path}: holds finished targets; choose another --output, or delete it")
        progress = self.path / PROGRESS_FILE
        if not progress.exists():
            return 0
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
            return 0
        if type(num) is not int or not 0 <= num <= self.facts.num_examples:
            raise ValueError(f"{progress}: malformed, num_written is {num!r}; delete {self.path} and start again")
        if num and (not self._data.is_file() or self._data.stat().st_size < num * self.facts.bytes_of_example):
            raise ValueError(
                f"{self._data}: shorter than {num} examples: truncated; delete {self.path} and start again"
            )
        return num

    @contextmanager
    def prepared(self) -> Iterator[int]:
        """Create and lock the folder, and yield the first example without targets."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            self.num_written = self._num_durable()  # again, now under the lock
            self._save_progress()
            with open(self._data, "ab") as file:
                file.truncate(self.num_written * self.facts.bytes_of_example)
            yield self.num_written

    def write(self, first: int, ids: Tensor, probabilities: Tensor | None) -> None:
        """Write the targets of the examples from id ``first`` on: ids [B, L, N], probabilities for top_k. On any rank.

        OSError if they cannot be written.
        """
        records = np.empty(ids.shape[:2], dtype=self.facts.record)
        records["ids"] = ids.numpy()
        if probabilities is not None:
            records["probabilities"] = probabilities.numpy()
        file = os.open(self._data, os.O_WRONLY)
        try:
            content, offset = memoryview(records.tobytes()), first * self.facts.bytes_of_example
            while content:
                done = os.pwrite(file, content, offset)
                content, offset = content[done:], offset + done
            os.fsync(file)
        finally:
            os.close(file)

    def durable(self, stop: int) -> None:
        """Record that all ranks have written the examples before ``stop``; finish the folder at the last one."""
        self.num_written = stop
        if stop < self.facts.num_examples:
            self._save_progress()
            return
        write_atomically(self.path / FACTS_FILE, encode_versioned(asdict(self.facts), format=FORMAT, version=VERSION))
        (self.path / PROGRESS_FILE).unlink()

    def _save_progress(self) -> None:
        content = asdict(self.facts) | {"num_written": self.num_written}
        write_atomically(self.path / PROGRESS_FILE, encode_versioned(content, format=FORMAT, version=VERSION))
