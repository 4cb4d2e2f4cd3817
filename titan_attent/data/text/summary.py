"""The report of the writer: counts, and one line on everything that was skipped, left out or noted, by reason."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from titan_attent.data.io.bad import BINARY, ENCODING, SKIPPED_FILE
from titan_attent.data.io.walk import LeftOut, by_count


@dataclass(frozen=True, kw_only=True)
class TextSummary:
    """The counts of a written data set.

    Attributes:
        num_documents, num_tokens, num_shards, fingerprint: of the data set, or else of its training data.
        num_skipped: number of files that were not text.
        source_tokens: number of tokens per source, in the order of the inputs.
        tokens_per_second: the speed of this run, without the shards of an interrupted run before it.
    """

    path: Path
    num_documents: int
    num_tokens: int
    num_shards: int
    num_skipped: int
    source_tokens: dict[str, int]
    tokens_per_second: float
    fingerprint: str
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of unusable records and files, by reason."""
    noted: dict[str, int] = field(default_factory=dict)
    """Number of documents per note: empty, with lone surrogates (now U+FFFD), with several JSON lines in one text."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """The entries of the input folders that were not read."""
    read: Counter[str] = field(default_factory=Counter)
    """Number of files that were read from folders, by extension."""
    validation: tuple[int, int] | None = None
    """Numbers of documents and tokens of the validation data; None if no documents are held out."""

    def files(self) -> str:
        """``read 12 .jsonl, 3 .json.gz``: the files of the input folders; "" without folders."""
        return f"read {by_count(self.read)}" if self.read else ""

    def warning(self) -> str:
        """One line on everything that was skipped, left out and noted; "" if nothing was."""
        parts = [describe_skipped(self.skipped, self.num_skipped, self.path / SKIPPED_FILE)] if self.skipped else []
        parts += [self.left_out.summary()] if self.left_out else []
        parts += [f"{count:,} documents {note}" for note, count in self.noted.items()]
        return "; ".join(parts)


def describe_skipped(skipped: dict[str, int], num_skipped: int, path: Path) -> str:
    """``skipped 2 files that are binary or not UTF-8, 5 without text (all in out/skipped.jsonl)``."""
    by_reason = {reason: count for reason, count in sorted(skipped.items()) if reason not in (BINARY, ENCODING)}
    num_records = sum(skipped.values()) - sum(by_reason.values()) - num_skipped
    by_reason |= {"records not UTF-8": num_records} if num_records else {}
    parts = [f"{num_skipped} files that are binary or not UTF-8"] if num_skipped else []
    parts += [f"{count:,} {reason}" for reason, count in by_reason.items()]
    return f"skipped {', '.join(parts)} (all in {path})"


def describe_no_documents(skipped: dict[str, int], num_skipped: int, left_out: LeftOut, *, path: Path) -> str:
    """Why the inputs gave no document, for the brackets in the error message."""
    parts = [f"{num_skipped} files are binary or not UTF-8"]
    parts += [f"{count:,} {reason}" for reason, count in sorted(skipped.items())]
    parts += [f"all of them in {path}"] if skipped else []
    parts += [left_out.summary()] if left_out else []
    return "; ".join(parts)
