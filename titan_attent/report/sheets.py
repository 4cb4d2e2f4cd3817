"""Contact sheets: images in rows, with a few lines of text under each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

BOX = 128
"""The side of the square, in pixels, into which an image is scaled."""
COLUMNS, GAP, MARGIN, LINE = 12, 14, 24, 17
HEADING, TITLE = 44, 64  # heights


@dataclass(frozen=True)
class Cell:
    """An image and the lines under it."""

    image: Image.Image
    lines: Sequence[str]


def draw_sheet(title: str, blocks: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """Draw a page of blocks: each is a heading, which may be empty, above rows of :data:`COLUMNS` cells."""
    step = BOX + GAP
    heights = []
    for heading, cells in blocks:
        lines = max((len(cell.lines) for cell in cells), default=0)
        heights.append((HEADING * bool(heading), BOX + LINE * lines + GAP, -(-len(cells) // COLUMNS)))
    width = 2 * MARGIN + COLUMNS * step - GAP
    height = TITLE + MARGIN + sum(above + rows * row for above, row, rows in heights)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, MARGIN), title, size=20, width=width - 2 * MARGIN)
    top = TITLE
    for (heading, cells), (above, row, rows) in zip(blocks, heights, strict=True):
        if heading:
            _write(draw, (MARGIN, top + 14), heading, size=16, width=width - 2 * MARGIN)
        for i, cell in enumerate(cells):
            left, y = MARGIN + i % COLUMNS * step, top + above + i // COLUMNS * row
            picture = scaled(cell.image)
            # Centered, with its lower edge at the text.
            sheet.paste(picture, (left + (BOX - picture.width) // 2, y + BOX - picture.height))
            for j, line in enumerate(cell.lines):
                position = left + BOX // 2, y + BOX + 4 + j * LINE
                _write(
                    draw, position, line, size=13, width=BOX + GAP - 4, anchor="ma", color="#555555" if j else "black"
                )
        top += above + rows * row
    return sheet


def scaled(image: Image.Image) -> Image.Image:
    """The image, scaled to the box with its aspect ratio kept.

    Images up to half of the box are enlarged by a whole factor, so that all pixels have equal size.
    """
    factor = BOX / max(image.size)
    if factor >= 2:
        factor = int(factor)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((size[0], size[1]), resampling)


def _write(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    *,
    size: int,
    width: int,
    anchor: str = "la",
    color: str = "black",
) -> None:
    """Write one line, cut to ``width`` pixels."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    text = " ".join(text.split())
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(position, text, fill=color, font=font, anchor=anchor)
