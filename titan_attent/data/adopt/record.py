"""The finished shards of an interrupted command, one line each in adopting.jsonl beside the index, which comes last.

A line is used if its file has the size and time, and the shard the place and rule, that it had. The lines of another
tokenizer or other options are ignored, and so is a line that a crash cut off.

Cost: about 500 bytes per shard, and an fsync every few seconds; after a crash at most these seconds are scanned again.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from titan_attent.data.adopt.options import RECORD_FILE
from titan_attent.data.text.format import ShardEntry
from titan_attent.foundations.typed import typed

_SYNC_SECONDS = 5.0


class Known(NamedTuple):
    """A finished shard.

    Attributes:
        max_token_id: the largest id in it, or in the data set.
        is_cut: whether it begins or ends inside a document.
    """

    entry: ShardEntry
    max_token_id: int
    is_cut: bool


class Record:
    """The record in ``folder``; a context manager. Use :meth:`add` from one thread.

    Args:
        settings: JSON values that decide about the shards; a record of others is replaced.
    """

    def __init__(self, folder: Path, *, settings: Any):
        self.path, self._settings = folder / RECORD_FILE, json.dumps(settings, sort_keys=True)
        self._known: dict[str, Known] = {}
        self._file: IO[str] | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> "Record":
        lines = self._lines()
        is_same = bool(lines) and lines[0] == {"settings": self._settings}
        for line in lines[1:] if is_same else []:
            try:
                entry = typed(ShardEntry, line["entry"])
                self._known[entry.file] = Known(entry, int(line["max_token_id"]), bool(line["is_cut"]))
            except (ValueError, KeyError, TypeError):
                continue
        self._file = open(self.path, "a" if is_same else "w", encoding="ascii")  # noqa: SIM115
        # After a line that a crash cut off, a new one.
        self._file.write("\n" if is_same else json.dumps({"settings": self._settings}) + "\n")
        self._file.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        self._file.close()

    def _lines(self) -> list[Any]:
        try:
            content = self.path.read_text(encoding="ascii", errors="replace")
        except OSError:
            return []
        lines = []
        for line in content.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    @staticmethod
    def has_shards(folder: Path) -> bool:
        """Whether a record in ``folder`` has finished shards."""
        path = folder / RECORD_FILE
        return path.is_file() and b'"entry"' in path.read_bytes()

    def know(self, entries: Iterable[ShardEntry], *, max_token_id: int) -> None:
        """Take the shards of a finished index as known, unless this record has newer ones."""
        for entry in entries:
            self._known.setdefault(entry.file, Known(entry, max_token_id, False))

    def find(self, entry: ShardEntry, *, documents_sha256: str) -> Known | None:
        """A finished shard of this place, if its files beside the index are there.

        Args:
            entry: the shard with its view, before it is scanned.
            documents_sha256: of its documents by the format's index; empty if ids separate them.
        """
        known = self._known.get(entry.file)
        if known is None or documents_sha256 not in ("", known.entry.documents_sha256):
            return None
        done = known.entry
        if (done.view, done.num_tokens, done.source) != (entry.view, entry.num_tokens, entry.source):
            return None
        for name, num_bytes, _ in done.files(0):
            path = self.path.with_name(name)
            if not path.is_file() or path.stat().st_size != num_bytes:
                return None
        return known

    def add(self, known: Known) -> None:
        """Record a finished shard."""
        assert self._file is not None
        line = {"entry": asdict(known.entry), "max_token_id": known.max_token_id, "is_cut": known.is_cut}
        self._file.write(json.dumps(line) + "\n")
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
