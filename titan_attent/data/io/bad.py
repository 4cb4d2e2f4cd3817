"""Unusable records and files of an input: what is wrong, where, and how to fix it; and skipped.jsonl, their list."""

import json
import os
from pathlib import Path
from typing import NamedTuple

SKIPPED_FILE = "skipped.jsonl"
"""The list of skipped records and files, one per line, in the data set's folder."""

MALFORMED, NO_TEXT, NO_STRING = "malformed", "without text", "not a string"
"""Reasons for a record: not a JSON object; text key missing or null; value of another type."""
ENCODING, BINARY, SIZE, DAMAGED = "not UTF-8", "binary", "too large", "damaged"
"""Reasons: undecodable bytes; NUL characters; above the size limit; damaged file, skipped from the damage on."""


class Bad(NamedTuple):
    """An unusable record, image, file or remainder of a file: what is wrong, and how to fix it."""

    where: str
    reason: str
    """One of the constants above; for images, one of images/examples.py."""
    problem: str
    fix: str

    def message(self) -> str:
        return f"{self.where}: {self.problem}; {self.fix}, or leave out what cannot be used with --on-bad skip"

    def line(self) -> str:
        """The line of ``skipped.jsonl``."""
        return json.dumps({"where": self.where, "reason": self.reason, "problem": self.problem[:300]}) + "\n"


class SkippedLog:
    """The file ``skipped.jsonl`` of a folder; a resumed writer appends to it.

    Args:
        folder: the folder of the data set.
        num_bytes: length of the file when the interrupted run last saved its progress; longer files are truncated to
            it.
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
        """Write all lines to disk and update ``num_bytes``, the length of the file."""
        if self._lines:
            with open(self.path, "ab") as file:
                self.num_bytes += file.write(b"".join(self._lines))
                file.flush()
                os.fsync(file.fileno())
            self._lines.clear()
