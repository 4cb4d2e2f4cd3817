"""JSON lines beside the checkpoints, for audits and for proofs of resumption; every line has its "step".

    trace.jsonl    a step's global batch       {"step": 12, "round": 1, "strategy": "soft", "ids": [8, 301, ...]}
    rounds.jsonl   what was decided of a pass  {"step": 10, "pass": 0, "teacher/ratio": 0.5, ...}

Written by rank 0 alone, a line at a time, flushed, so that a killed run loses at most its last line. A resumed run
drops the lines of steps that it trains again, and lines that are damaged, with a warning; a fresh run in an old folder
moves the old file aside.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Append-only JSON lines at ``path``, continued after ``step`` training steps."""

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
        """Drop lines after ``step``, a line that a kill cut short, and damaged ones; the file is replaced whole."""
        temporary, bad = self.path.with_suffix(".tmp"), list[int]()
        with open(self.path, "rb") as old, open(temporary, "wb") as new:
            for number, line in enumerate(old, 1):
                found = _step_of(line) if line.endswith(b"\n") else None
                if found is None:
                    bad.append(number)
                elif found <= step:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
        if bad:
            many = f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""
            logger.warning(f"{self.path}: line {bad[0]:,} is cut short or damaged{many}; left out of what goes on")


def _step_of(line: bytes) -> int | None:
    """The training step of a line, or None where it is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None
