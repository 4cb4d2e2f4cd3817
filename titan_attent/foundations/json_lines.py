"""Append-only JSON lines beside the checkpoints, to audit a run and to verify a resume; every line has its "step".

    trace.jsonl    the global batch of a step   {"step": 12, "round": 1, "strategy": "soft", "ids": [8, 301, ...]}
    rounds.jsonl   the decisions for a pass     {"step": 10, "pass": 0, "teacher/ratio": 0.5, ...}

Only rank 0 writes. Every line is flushed, so a killed run loses at most its last line. A resumed run drops the lines of
steps that it trains again, and damaged lines with a warning. A new run in an old folder renames the old file.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """The JSON lines at ``path``, appended to by a run that starts after ``step`` training steps; 0 for a new run."""

    def __init__(self, path: str | os.PathLike[str], *, step: int):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if step == 0:
                self._move_aside()
            else:
                self._keep_until(step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; ``record["step"]`` is the training step that it belongs to."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _move_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
            number += 1
        os.replace(self.path, aside)

    def _keep_until(self, step: int) -> None:
        """Drop lines after ``step``, truncated and damaged lines; the file is replaced atomically."""
        temporary, damaged = self.path.with_suffix(".tmp"), list[int]()
        with open(self.path, "rb") as old, open(temporary, "wb") as new:
            for number, line in enumerate(old, 1):
                line_step = _step_of(line) if line.endswith(b"\n") else None
                if line_step is None:
                    damaged.append(number)
                elif line_step <= step:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
        if damaged:
            more = f", and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
            logger.warning(f"{self.path}: line {damaged[0]:,} is truncated or damaged{more}; dropped from the file")


def _step_of(line: bytes) -> int | None:
    """The training step of a line; None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None
