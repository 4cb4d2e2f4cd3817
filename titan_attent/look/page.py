"""A look as one HTML page: its histogram as SVG, images as PNG within the page. It loads nothing and runs no script."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape

from titan_attent.data.text.decoded import escaped
from titan_attent.look.contents import Look, Row
from titan_attent.look.tables import Bin
from titan_attent.look.terminal import MAX_SOURCES, NAMED_SOURCES

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
table { border-collapse: collapse; } th, td { padding: 0.15rem 0.8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 1px solid #999; }
.chosen { background: #cfe8f7; }
.warning { border-left: 4px solid #D55E00; padding-left: 0.8rem; }
.row { color: #666; font-size: 0.85rem; margin: 0.6rem 0 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; margin: 0.1rem 0 0.6rem;
      padding: 0.5rem 0.7rem; background: #f5f5f5; border-left: 4px solid #0072B2; font-size: 13px; }
pre.dropped { border-left-color: #D55E00; } img { max-width: 100%; }
"""
KEPT, DROPPED, TRUSTED = "#0072B2", "#D55E00", "#009E73"


def page_of(look: Look) -> str:
    """The page, ASCII."""
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>{_text(look.title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{_text(look.title)}</h1>",
            *_body(look),
            "</body></html>",
        ]
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii") + "\n"


def _body(look: Look) -> Iterator[str]:
    yield from (f"<p>{_text(line)}</p>" for line in (look.lengths, *look.notes) if line)
    decision = look.decision
    if decision is not None:
        yield f"<p><b>Score:</b> {_text(decision.name)}</p>"
        if decision.rule:
            yield f"<p><b>Rule:</b> <code>[teacher] {_text(', '.join(decision.rule))}</code></p>"
        yield f"<p><b>Forecast:</b> {_text(decision.forecast)}.</p>"
        yield from (f'<p class="warning">{_text(warning)}</p>' for warning in decision.warnings)
    yield "<h2>Sources</h2>"
    yield _sources(look)
    if look.bins:
        yield f"<h2>Histogram of the {'scores' if decision else 'lengths in tokens'}</h2>"
        yield chart(look.bins, has_kept=decision is not None and decision.kept is not None)
    if look.cuts:
        yield "<h2>Shares kept at other cuts</h2>"
        yield _cuts(look)
    yield "<h2>Rows</h2>"
    for group, rows in look.groups:
        yield f"<h3>{_text(group.source)}: {_text(group.heading)}</h3>"
        if look.subject.is_text:
            is_dropped = group.heading.startswith("dropped")
            for row in rows:
                yield f'<p class="row">{_text(_facts(row))}</p>'
                more = "" if row.is_whole else " ..."
                kind = ' class="dropped"' if is_dropped else ""
                yield f"<pre{kind}>{escape(escaped(row.text, keep=_LAYOUT))}{more}</pre>"
        else:
            yield _sheet(look, rows)


_LAYOUT = "\n\t"
"""Control characters that a page shows as they are."""


def _text(text: str) -> str:
    return escape(escaped(text))


def _facts(row: Row) -> str:
    parts = [f"#{row.id}", f"{row.length:,} tokens"]
    parts += [] if row.score is None else [f"score {row.score:.4g}"]
    return ", ".join([*parts, row.place])


def _sources(look: Look) -> str:
    is_text, has_kept = look.subject.is_text, look.sources[0].kept is not None
    header = ["source", f"{look.subject.unit.split()[0]}s", *["tokens"] * is_text, *["kept"] * has_kept]
    header += ["of its tokens"] * (is_text and has_kept)
    rows = []
    for row in [*look.sources[:MAX_SOURCES], *look.sources[MAX_SOURCES:][-1:]]:
        cells = [row.name, f"{row.examples:,}", *[f"{row.tokens:,}"] * is_text]
        cells += [] if row.kept is None else [f"{row.kept:.1%}"]
        cells += [f"{row.kept_tokens:.1%}"] if is_text and row.kept_tokens is not None else []
        rows.append(cells)
    return table(header, rows)


def _cuts(look: Look) -> str:
    names = [row.name for row in look.sources if row.name != "all" or len(look.sources) == 1]
    names = names[:NAMED_SOURCES] if len(names) > 1 else []
    header = ["kept", "score from", *(["trusted kept"] if look.cuts[0].trusted is not None else []), *names]
    header += ["times trained"] * bool(look.size.steps)
    rows = []
    for cut in look.cuts:
        cells = [f"{cut.share:.1%}", f"{cut.score:.4g}", *([] if cut.trusted is None else [f"{cut.trusted:.1%}"])]
        cells += [f"{share:.1%}" for share in cut.by_source[: len(names)]]
        rows.append([*cells, *([] if cut.visits is None else [f"{cut.visits:.2f}"])])
    return table(header, rows, chosen=[cut.is_chosen for cut in look.cuts])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, chosen: Sequence[bool] = ()) -> str:
    """A table; rows of ``chosen`` are marked."""
    lines = ["<table><tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>"]
    for i, cells in enumerate(rows):
        mark = ' class="chosen"' if i < len(chosen) and chosen[i] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def chart(bins: Sequence[Bin], *, has_kept: bool) -> str:
    """The histogram as SVG: bars of the kept and the dropped, and a line for trusted text."""
    width, height, left, bottom = 760, 240, 10, 36
    bar = (width - 2 * left) / len(bins)
    largest = max([each.kept + each.dropped for each in bins] + [each.trusted or 0 for each in bins] + [1e-9])
    scale = (height - bottom - 24) / largest
    floor = height - bottom
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" font-size="12" fill="#222">']
    for i, each in enumerate(bins):
        x, inside, outside = left + i * bar, each.kept * scale, each.dropped * scale
        tip = f"{each.low:.4g} to {each.high:.4g}: {each.kept + each.dropped:.1%}"
        tip += f", of which dropped {each.dropped:.1%}" if has_kept else ""
        parts.append(
            f'<g><title>{tip}</title><rect x="{x:.1f}" y="{floor - inside:.1f}" width="{bar - 1:.1f}" '
            f'height="{inside:.1f}" fill="{KEPT}"/><rect x="{x:.1f}" y="{floor - inside - outside:.1f}" '
            f'width="{bar - 1:.1f}" height="{outside:.1f}" fill="{DROPPED}"/></g>'
        )
        if i % max(1, len(bins) // 5) == 0:
            parts.append(f'<text x="{x:.1f}" y="{floor + 16}">{each.low:,.4g}</text>')
    if bins[0].trusted is not None:
        points = " ".join(
            f"{left + (i + 0.5) * bar:.1f},{floor - (each.trusted or 0) * scale:.1f}" for i, each in enumerate(bins)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{TRUSTED}" stroke-width="2"/>')
    legend = [("data", KEPT)] if not has_kept else [("kept", KEPT), ("dropped", DROPPED)]
    legend += [("held-out trusted", TRUSTED)] if bins[0].trusted is not None else []
    for i, (name, color) in enumerate(legend):
        x = left + 130 * i
        parts.append(f'<rect x="{x}" y="{height - 12}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{x + 15}" y="{height - 3}">{name}</text>')
    return "\n".join([*parts, "</svg>"])


def _sheet(look: Look, rows: Sequence[Row]) -> str:
    """A sheet of pictures with their classes, ids and scores."""
    from titan_attent.report.sheets import Cell, draw_sheet  # takes a second: matplotlib

    cells = [
        Cell(
            look.subject.thumbnail(row.id),
            [escaped(row.label), f"id {row.id}", *([] if row.score is None else [f"{row.score:.4g}"])],
        )
        for row in rows
    ]
    content = io.BytesIO()
    draw_sheet("", [("", cells)]).save(content, format="PNG")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{_text(", ".join(row.label for row in rows))}" src="data:image/png;base64,{data}">'
