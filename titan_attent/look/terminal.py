"""A look as text for a terminal: at most 100 columns, with every control character escaped."""

import unicodedata
from collections.abc import Iterator, Sequence

from titan_attent.data.text.decoded import escaped
from titan_attent.look.contents import Look, Row

WIDTH = 100
NUM_TEXT_LINES = 3
"""Lines of the text of a row."""
MAX_SOURCES = 20
"""Sources in the table of sources."""
NAMED_SOURCES = 4
"""Sources that have a column in the table of cuts."""
_BAR = 46


def lines_of(look: Look) -> Iterator[str]:
    """The lines of a look."""
    yield from wrapped(escaped(look.title))
    if look.lengths:
        yield from wrapped(look.lengths)
    for note in look.notes:
        yield from wrapped(escaped(note))
    yield from ("", *_sources(look))
    decision = look.decision
    if decision is not None:
        yield ""
        yield from wrapped(f"Score: {decision.name}")
        if decision.rule:
            yield from wrapped(escaped(f"Rule: [teacher] {', '.join(decision.rule)}"))
        yield from wrapped(escaped(f"Forecast: {decision.forecast}."))
        if not look.size.steps and decision.kept is not None:
            yield from wrapped("For how often each example is trained, give --steps, --batch and --seq-len")
        for warning in decision.warnings:
            yield from wrapped(escaped(f"Warning: {warning}"))
    if look.bins:
        yield from ("", *_histogram(look))
    if look.cuts:
        yield from ("", *_cuts(look))
    for group, rows in look.groups:
        yield ""
        yield from wrapped(escaped(f"-- {group.source}: {group.heading} --"))
        for row in rows:
            yield from _row(look, row)


def _sources(look: Look) -> list[str]:
    header = ["source", f"{look.subject.unit.split()[0]}s", "share"] + ["tokens"] * look.subject.is_text
    has_kept = look.sources[0].kept is not None
    header += ["kept"] * has_kept + ["of its tokens"] * (has_kept and look.subject.is_text)
    total = sum(row.examples for row in look.sources if row.name != "all" or len(look.sources) == 1)
    shown = [*look.sources[:MAX_SOURCES], *look.sources[MAX_SOURCES:][-1:]]
    table = []
    for row in shown:
        cells = [_cut(escaped(row.name), 30), f"{row.examples:,}", f"{row.examples / max(1, total):.1%}"]
        cells += [f"{row.tokens:,}"] * look.subject.is_text
        if row.kept is not None and row.kept_tokens is not None:
            cells += [f"{row.kept:.1%}"] + [f"{row.kept_tokens:.1%}"] * look.subject.is_text
        table.append(cells)
    lines = table_of(header, table)
    if len(shown) < len(look.sources):
        lines.append(f"({len(look.sources) - len(shown)} more sources)")
    return lines


def _histogram(look: Look) -> list[str]:
    has_trusted = look.bins[0].trusted is not None
    is_of_scores, kept = look.decision is not None, look.decision is not None and look.decision.kept is not None
    what = "scores" if is_of_scores else "lengths in tokens"
    title = f"Histogram of the {what}" + (" (# kept, . dropped)" if kept else "")
    lines = [title + ("; on the right, that of held-out trusted text" if has_trusted else "")]
    scale = _BAR / max(max(each.kept + each.dropped for each in look.bins), 1e-9)
    labels = [f"{each.low:,.4g}" for each in look.bins]
    width = max(map(len, labels))
    for label, each in zip(labels, look.bins, strict=True):
        full = round((each.kept + each.dropped) * scale)
        inside = round(each.kept * scale)
        bar = "#" * inside + "." * (full - inside)
        trusted = "" if each.trusted is None else f" {each.trusted:7.1%}"
        lines.append(f"{label:>{width}} | {bar:<{_BAR}} {each.kept + each.dropped:6.1%}{trusted}")
    return lines


def _cuts(look: Look) -> list[str]:
    names = [row.name for row in look.sources if row.name != "all" or len(look.sources) == 1]
    names = names[:NAMED_SOURCES] if len(names) > 1 else []
    header = ["kept", "score from", *(["trusted kept"] if look.cuts[0].trusted is not None else [])]
    header += [_cut(escaped(name), 13) for name in names] + ["times trained"] * bool(look.size.steps) + [""]
    table = []
    for cut in look.cuts:
        cells = [f"{cut.share:.1%}", f"{cut.score:.4g}"]
        cells += [] if cut.trusted is None else [f"{cut.trusted:.1%}"]
        cells += [f"{share:.1%}" for share in cut.by_source[: len(names)]]
        cells += [] if cut.visits is None else [f"{cut.visits:.2f}"]
        table.append([*cells, "<- the cut" if cut.is_chosen else ""])
    return ["Shares kept at other cuts", *table_of(header, table)]


def _row(look: Look, row: Row) -> Iterator[str]:
    parts = [f"#{row.id}"]
    parts += [f"{row.length:,} tokens"] if look.subject.is_text else [row.label]
    parts += [] if row.score is None else [f"score {row.score:.4g}"]
    parts.append(row.place)
    yield from wrapped(escaped("  ".join(parts)))
    if not look.subject.is_text:
        return
    lines = list(wrapped(escaped(row.text), indent="    ", at_most=NUM_TEXT_LINES + 1))
    more = len(lines) > NUM_TEXT_LINES or not row.is_whole
    lines = lines[:NUM_TEXT_LINES]
    if more:
        lines[-1] = "    " + _cut(lines[-1][4:] + "...", WIDTH - 4)
    yield from lines


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as needed; the first is aligned to the left, the others to the right."""
    widths = [max(map(columns, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        first, *others = ((" " * (width - columns(cell)), cell) for width, cell in zip(widths, cells, strict=True))
        lines.append((first[1] + first[0] + "".join(f"  {space}{cell}" for space, cell in others)).rstrip())
    return lines


def columns(text: str) -> int:
    """The columns that a terminal takes for printable text: 2 per wide character, 0 per combining one."""
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _cut(text: str, width: int) -> str:
    if columns(text) <= width:
        return text
    kept = next(wrapped(text, width=width - 3))
    return kept + "..."


def wrapped(text: str, *, indent: str = "", width: int = WIDTH, at_most: int | None = None) -> Iterator[str]:
    """Lines of at most ``width`` columns, broken at any character if a line has no space; ``at_most`` of them."""
    line, used, last_space, count = "", len(indent), -1, 0
    for char in text:
        if used + _columns(char) > width:
            cut = last_space + 1 if not indent and last_space > 0 else len(line)
            yield indent + line[:cut].rstrip()
            count += 1
            if count == at_most:
                return
            line = line[cut:]
            used, last_space = len(indent) + columns(line), line.rfind(" ")
        if char == " ":
            last_space = len(line)
        line += char
        used += _columns(char)
    yield indent + line
