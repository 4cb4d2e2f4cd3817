"""Writes the files of stored.py: losses in one file that grows in order, resumable, completed by one small file.

A separate thread writes, so that computing losses does not wait for a disk. The losses of each call of ``append`` are
fsynced and then counted in scoring.json, which is replaced atomically. After a crash this count is the length of a
valid prefix of the losses, and bytes after it are cut off.

Cost: 4 bytes per example on disk, written and hashed once; per appended chunk 3 opens, 3 fsyncs and one rename, and its
bytes in memory until then. Resuming reads the prefix once, in the thread. Finishing writes one small file.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.files import HASH_BLOCK
from titan_attent.data.io.folder import locked
from titan_attent.foundations.versioned_json import encode_versioned
from titan_attent.scores.stored import (
    DTYPE,
    FORMAT,
    LOSSES_FILE,
    PARTS_FOLDER,
    SCORES_FILE,
    SCORING_FILE,
    VERSION,
    Scoring,
    earlier_version_problem,
    read_json,
    with_inferred_fields,
)

BACKLOG = 256
"""Number of chunks that may wait to be written: 64 MiB in chunks of 2^16 losses. Thus computing continues while the
prefix of a killed scoring is read.
"""


class ScoresWriter:
    """Writes the losses of a scorer in the order of the examples, or resumes a killed scoring.

    Constructing one only reads the folder, which every rank may do. One process enters it as a context manager, and
    writes:

        with ScoresWriter(folder, scoring=scoring) as writer:
            while writer.num_scored < scoring.num_examples:
                writer.append(losses)  # of the next examples, from id num_scored on
            writer.finish()

    Attributes:
        num_scored: number of losses on disk or appended.

    Raises:
        ValueError: the folder holds finished scores or those of another scoring, is damaged, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, scoring: Scoring):
        self.path, self.scoring = Path(path), scoring
        self._losses, self._scoring = self.path / LOSSES_FILE, self.path / SCORING_FILE
        self._stack = ExitStack()
        self._pending: deque[Future[None]] = deque()
        self._error: BaseException | None = None
        with self._file_errors():
            self.num_scored = self._num_durable()

    def _num_durable(self) -> int:
        """Number of durably written losses; ValueError if the folder cannot be used for this scoring."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: is a file; choose another folder")
        if (self.path / SCORES_FILE).exists():
            raise ValueError(f"{self.path}: holds finished scores; choose another --output, or delete it first")
        if (self.path / PARTS_FOLDER).is_dir():
            raise ValueError(f"{self.path}: {earlier_version_problem(self.path)}")
        if not self._losses.exists() or not (size := self._losses.stat().st_size):
            return 0
        fix = f"delete {self._losses} to start again"
        stored = {"loss": "", "role": ""} | with_inferred_fields(read_json(self._scoring, fix=fix))
        num_durable = stored.get("num_scored")
        if type(num_durable) is int and num_durable == 0:
            return 0  # a wrong command that wrote nothing must not block the right one
        unchecked = {"checkpoint"} if stored["role"] else {"checkpoint", "role"}  # a resumed command may add the role
        differing = [
            f"{name} was {stored.get(name)!r} and is {value!r}"
            for name, value in self.scoring.stated().items()
            if name not in unchecked and stored.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{self.path}: holds another interrupted scoring: {'; '.join(differing)}. Use the same data, model and "
                f"checkpoint to resume it, or {fix}"
            )
        if type(num_durable) is not int or not 0 < num_durable <= self.scoring.num_examples:
            raise ValueError(f"{self._scoring}: malformed, num_scored is {num_durable!r}; {fix}")
        if size < num_durable * DTYPE.itemsize:
            raise ValueError(
                f"{self._losses}: has {size} bytes, but {num_durable * DTYPE.itemsize} were written: truncated or "
                f"replaced; {fix}"
            )
        return num_durable

    def __enter__(self) -> "ScoresWriter":
        with ExitStack() as stack, self._file_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(self.path))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}: another scoring is writing to this folder; wait for it, or choose another --output"
                ) from error
            self.num_scored = self._durable = self._num_durable()  # again, now under the lock
            self._save_progress()
            with open(self._losses, "ab") as file:
                file.truncate(self._durable * DTYPE.itemsize)
            self._sha256 = hashlib.sha256()
            self._thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="titan_attent-writer"))
            self._stack = stack.pop_all()
        if self._durable:
            self._later(self._read_prefix)
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait until all appended losses are written, however the scoring ended."""
        self._stack.close()

    def check_finite(self, start: int, losses: Tensor) -> None:
        """ValueError if a loss of the examples from id ``start`` on, a float tensor [n] on the CPU, is not finite.

        For every rank: ranks with the same losses raise the same error.
        """
        self._check_finite(start, losses.float().numpy().astype(DTYPE))

    def append(self, losses: Tensor) -> None:
        """Append the losses of the next examples, a float tensor [n] on the CPU; they are stored as fp32.

        An error while writing them sets :attr:`failed`, and is raised by :meth:`wait` and :meth:`finish`.

        Raises:
            ValueError: a loss is not finite; none of them is written.
        """
        array = losses.float().numpy().astype(DTYPE)
        self._check_finite(self.num_scored, array)
        self.num_scored += len(array)
        assert self.num_scored <= self.scoring.num_examples
        self._later(self._write, array)

    @property
    def failed(self) -> bool:
        """Whether a read or a write has failed; nothing is written after that."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until all appended losses are written; raise the ValueError if that failed."""
        wait(self._pending)
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all losses are written, and complete the folder with one small file."""
        self.wait()
        assert self._durable == self.scoring.num_examples
        content = {**self.scoring.stated(), "sha256": self._sha256.hexdigest()}
        with self._file_errors():
            write_atomically(self.path / SCORES_FILE, _json(content))
            self._scoring.unlink()

    def _later(self, action: Callable[..., None], *args: Any) -> None:
        """Call ``action`` in the thread, after all earlier actions and only if none of them failed."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= BACKLOG):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._unless_failed, action, *args))

    def _unless_failed(self, action: Callable[..., None], *args: Any) -> None:
        if self._error is None:
            try:
                with self._file_errors():
                    action(*args)
            except BaseException as error:
                self._error = error  # wait() raises it

    def _write(self, losses: np.ndarray) -> None:
        with open(self._losses, "ab") as file:
            file.write(losses.data)
            file.flush()
            os.fsync(file.fileno())
        self._sha256.update(losses.data)
        self._durable += len(losses)
        self._save_progress()

    def _read_prefix(self) -> None:
        """Hash the losses that a killed scoring has written, and check that they are finite."""
        with open(self._losses, "rb") as file:
            for start in range(0, self._durable, HASH_BLOCK // DTYPE.itemsize):
                block = file.read(HASH_BLOCK)
                self._sha256.update(block)
                self._check_finite(start, np.frombuffer(block, dtype=DTYPE))

    def _save_progress(self) -> None:
        write_atomically(self._scoring, _json({**self.scoring.stated(), "num_scored": self._durable}))

    def _check_finite(self, start: int, losses: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise ValueError(
                f"{self.path}: {len(bad)} of the {len(losses)} losses from example {start} on are not finite, first "
                f"those of examples {', '.join(map(str, bad[:5] + start))}: the weights in {self.scoring.checkpoint} "
                f"are broken, or overflow in this precision. Delete {self._losses} and score with another checkpoint, "
                'or with training.mixed_precision_param = "float32"'
            )

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot read or write the losses ({error}). Free some space or correct the permissions, "
                "and run the same command again to resume; or choose another --output"
            ) from error


def _json(content: dict[str, Any]) -> bytes:
    return encode_versioned(content, format=FORMAT, version=VERSION)
