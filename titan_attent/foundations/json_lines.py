"""JSON lines beside the checkpoints, for audits and for proofs of resumption; every line has its "step".

    trace.jsonl    a step's global batch       {"step": 12, "round": 1, "strategy": "soft", "ids": [8, 301, ...]}
    rounds.jsonl   what was decided of a pass  {"step": 10, "pass": 0, "teacher/ratio": 0.5, ...}

Written by rank 0 alone, a line at a time, flushed, so that a killed run loses at most its last line. A resumed run
drops the lines of steps that it trains again; a fresh run in an old folder moves the old file aside.
"""

import json
import os
from pathlib import Path
from typing import Any


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
        """Drop lines after ``step`` and a line that a kill cut short; the file is replaced whole."""
        temporary = self.path.with_suffix(".tmp")
        with open(self.path, encoding="utf-8") as old, open(temporary, "w", encoding="utf-8") as new:
            for line in old:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
                new.write(line)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
