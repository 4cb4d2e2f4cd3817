"""What of an input cannot be used: why, where, and how to mend it; and the file that lists what text was left out."""

import json
import os
from pathlib import Path
from typing import NamedTuple

SKIPPED_FILE = "skipped.jsonl"
"""In the data set's folder: a line for each record and file that was left out."""

MALFORMED, NO_TEXT, NO_STRING = "malformed", "without text", "not a string"
"""No JSON object; one without the key, or with null for it; one with a value of another type."""
ENCODING, BINARY, SIZE, DAMAGED = "not UTF-8", "binary", "too large", "damaged"
"""Bytes that are no text; NULs in it; more than the largest document; a file that ends early, with all behind."""


class Bad(NamedTuple):
    """A record, an image, a file or the rest of one that cannot be used: what is wrong, and how to mend it."""

    where: str
    reason: str
    """One of those above; of images one of images/examples.py."""
    problem: str
    mend: str

    def message(self) -> str:
        return f"{self.where}: {self.problem}; {self.mend}, or leave out what cannot be used with --on-bad skip"

    def line(self) -> str:
        """Of ``skipped.jsonl``."""
        return json.dumps({"where": self.where, "reason": self.reason, "problem": self.problem[:300]}) + "\n"


class SkippedLog:
    """``skipped.jsonl`` of a folder, which a resumed writer goes on with.

    Args:
        folder: of the data set.
        num_bytes: what of the file is kept: what a run had written when it recorded its progress.
    """

    def __init__(self, folder: Path, *, num_bytes: int):
        self.path, self.num_bytes = folder / SKIPPED_FILE, num_bytes
        if num_bytes == 0:
            self.path.unlink(missing_ok=True)
        else:
            os.truncate(self.path, num_bytes)
        self._lines: list[bytes] = []

    def add(self, bad: Bad) -> None:
        self._lines.append(bad.line().encode("ascii"))
        if len(self._lines) >= 10_000:
            self.flush()

    def flush(self) -> None:
        """Bring all to disk; ``num_bytes`` is the file's length then."""
        if self._lines:
            with open(self.path, "ab") as file:
                self.num_bytes += file.write(b"".join(self._lines))
                file.flush()
                os.fsync(file.fileno())
            self._lines.clear()
