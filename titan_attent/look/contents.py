"""Everything that a look shows, computed once for both of its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_attent.look.decision import Decision, RunSize
from titan_attent.look.groups import Group, groups_of
from titan_attent.look.subject import Subject
from titan_attent.look.tables import Bin, Cut, SourceRow, cuts, histogram, source_rows

MAX_TEXT_TOKENS = 400
"""Tokens of a row that are decoded."""


@dataclass(frozen=True)
class Row:
    """A row to show.

    Attributes:
        id: its example id.
        score: None without scores.
        length: in tokens; 1 for an image.
        label: the class of an image; empty for text.
        place: where it is on disk.
        text: the start of the text, with its control characters; empty for an image.
        is_whole: whether the text is all of it.
    """

    id: int
    score: float | None
    length: int
    label: str
    place: str
    text: str
    is_whole: bool


@dataclass(frozen=True, kw_only=True)
class Look:
    """The contents of a look.

    Attributes:
        subject, decision, size: what was looked at; no decision without scores.
        notes: lines on what could not be shown.
        sources: a row per source.
        bins: the histogram of the scores; of the lengths without scores; empty for images without scores.
        cuts: the shares at other cuts; empty unless a rule decides.
        groups: the rows, with what they have in common.
    """

    subject: Subject
    decision: Decision | None
    size: RunSize
    notes: Sequence[str]
    sources: Sequence[SourceRow]
    bins: Sequence[Bin]
    cuts: Sequence[Cut]
    groups: Sequence[tuple[Group, Sequence[Row]]]

    @property
    def title(self) -> str:
        """The data set in one line."""
        subject, num = self.subject, len(self.subject)
        total = f", {int(subject.lengths.sum()):,} tokens" if subject.is_text else ""
        plural = subject.unit.replace("span of a document", "spans of documents")
        plural = plural if plural != subject.unit or num == 1 else f"{plural}s"
        return f"{subject.path}: {num:,} {plural}{total}"

    @property
    def lengths(self) -> str:
        """The lengths in one line; empty for images and windows, which all have one."""
        values = self.subject.lengths
        if not self.subject.is_text or values.min() == values.max():
            return ""
        shares = np.quantile(values, [0.1, 0.5, 0.9]).astype(int).tolist()
        return (
            f"Tokens per {self.subject.unit}: mean {values.mean():,.1f}, shortest {values.min():,}, a tenth below "
            f"{shares[0]:,}, median {shares[1]:,}, a tenth above {shares[2]:,}, longest {values.max():,}"
        )


def look_at(subject: Subject, decision: Decision | None, size: RunSize, *, rows: int, max_sources: int) -> Look:
    """Compute a look.

    Args:
        rows: rows of a group.
        max_sources: number of sources whose rows are shown.
    """
    names, source_of = subject.source_names, subject.source_of
    kept = None if decision is None else decision.kept
    trusted = np.zeros(0) if decision is None else decision.trusted
    bins: list[Bin] = []
    if decision is not None or subject.is_text:
        values = subject.lengths if decision is None else decision.scores
        bins = histogram(values, kept=kept, trusted=trusted)
    notes = [subject.decoded.problem] if subject.is_text and subject.decoded.problem else []
    if len(names) > max_sources:
        notes.append(f"Rows are shown of the {max_sources} largest of {len(names)} sources; --sources N shows more")
    groups = groups_of(names, source_of, decision, rows=rows, max_sources=max_sources)
    return Look(
        subject=subject,
        decision=decision,
        size=size,
        notes=notes,
        sources=source_rows(names, source_of, subject.lengths, kept),
        bins=bins,
        cuts=[]
        if decision is None or decision.kept is None
        else cuts(decision, source_of, len(names), lengths=subject.lengths, size=size, rows=subject.dataset.num_rows),
        groups=[(group, _rows(subject, decision, group.ids)) for group in groups],
    )


def _rows(subject: Subject, decision: Decision | None, ids: np.ndarray) -> list[Row]:
    labels = [""] * len(ids) if subject.is_text else subject.class_of(ids)
    rows = []
    for i, label in zip(ids.tolist(), labels, strict=True):
        length = int(subject.lengths[i])
        rows.append(
            Row(
                id=i,
                score=None if decision is None else float(decision.scores[i]),
                length=length,
                label=label,
                place=_place(subject.dataset.location(i)),
                text=subject.decoded.text(i, max_tokens=MAX_TEXT_TOKENS) if subject.is_text else "",
                is_whole=length <= MAX_TEXT_TOKENS,
            )
        )
    return rows


def _place(location: dict[str, Any]) -> str:
    """The shard and the position in it, such as "shard-00000.bin, first_token 4096"."""
    return ", ".join(
        str(value) if key == "shard" else f"{key} {value}" for key, value in location.items() if key != "num_tokens"
    )
