"""What a writer did, and what it tells: what was skipped, left out and noted, by reason, in one line."""

from dataclasses import dataclass, field
from pathlib import Path

from titan_attent.data.io.bad import BINARY, ENCODING, SKIPPED_FILE
from titan_attent.data.io.walk import LeftOut


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the data set holds; ``num_skipped`` files were not text, ``tokens_per_second`` is of this run alone.

    ``source_tokens`` has the tokens of every source of the inputs, in their order.
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
    """Records and files that could not be used, by reason."""
    noted: dict[str, int] = field(default_factory=dict)
    """Documents that are empty, and that had lone surrogates, which became U+FFFD."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Of the folders given, what was not read."""

    def told(self) -> str:
        """What was skipped, left out and noted, in a line; "" where that is nothing."""
        parts = [told_skipped(self.skipped, self.num_skipped, self.path / SKIPPED_FILE)] if self.skipped else []
        parts += [self.left_out.summary()] if self.left_out else []
        parts += [f"{count:,} documents {note}" for note, count in self.noted.items()]
        return "; ".join(parts)


def told_skipped(skipped: dict[str, int], num_skipped: int, path: Path) -> str:
    """``skipped 2 files that are binary or not UTF-8, 5 without text (all in out/skipped.jsonl)``."""
    others = {reason: count for reason, count in sorted(skipped.items()) if reason not in (BINARY, ENCODING)}
    num_records = sum(skipped.values()) - sum(others.values()) - num_skipped
    others |= {"records not UTF-8": num_records} if num_records else {}
    parts = [f"{num_skipped} files that are binary or not UTF-8"] if num_skipped else []
    parts += [f"{count:,} {reason}" for reason, count in others.items()]
    return f"skipped {', '.join(parts)} (all in {path})"


def told_nothing(skipped: dict[str, int], num_skipped: int, left_out: LeftOut, *, path: Path) -> str:
    """Why nothing is left, in brackets."""
    parts = [f"{num_skipped} files are binary or not UTF-8"]
    parts += [f"{count:,} {reason}" for reason, count in sorted(skipped.items())]
    parts += [f"all of them in {path}"] if skipped else []
    parts += [left_out.summary()] if left_out else []
    return "; ".join(parts)
