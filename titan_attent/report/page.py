"""The report as one HTML page that needs no other file: sentences, tables, and pictures as data.

Cost: the pictures in base64, a third more than their files.
"""

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from titan_attent.report.picture import write_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222 }
div { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }
img { max-width: 100%; margin: 1rem 0 }
"""


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    tables: Sequence[Sequence[Sequence[str]]],
    sentences: Sequence[str],
    notes: Sequence[str],
    pictures: Sequence[Path],
) -> None:
    """Write the page, whole or not at all; OSError if it cannot be written.

    Args:
        tables: the cells of each table by row; the first row and the first column are headings.
        notes: what could not be read.
        pictures: PNG files.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in sentences)]
    parts += [f"<div>{_table(rows)}</div>" for rows in tables]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(f'<img alt="{escape(picture.name)}" src="data:image/png;base64,{data}">')
    if notes:
        parts.append(f"<h2>Left out</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = "\n".join(["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *parts, "</body></html>", ""])

    def write(file: Path) -> None:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")

    write_whole(path, write)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        kinds = ["th" if not i or not j else "td" for j in range(len(row))]
        cells = (f"<{kind}>{escape(cell)}</{kind}>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"
