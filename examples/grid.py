"""A labelled grid of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _MARGIN, _HEADER, _LABEL = 128, 8, 28, 56, 132
_INK, _MUTED, _PAPER, _CARD = (28, 30, 38), (108, 112, 124), (247, 247, 250), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of pictures; None leaves a cell empty."""

    label: str
    pictures: Sequence[Image.Image | None]


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows under one title. All panels of a grid have the same row labels."""

    title: str
    note: str
    rows: Sequence[Row]

    @property
    def columns(self) -> int:
        """Cells of the longest row."""
        return max(len(row.pictures) for row in self.rows)

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.columns * _CELL + (self.columns - 1) * _GAP


def draw_grid(panels: Sequence[Panel]) -> Image.Image:
    """Draw the panels side by side, their rows on the same lines, labelled on the left."""
    rows = max(len(panel.rows) for panel in panels)
    width = _MARGIN + _LABEL + sum(panel.width + 2 * _GAP for panel in panels) + _MARGIN * len(panels)
    height = _MARGIN + _HEADER + rows * (_CELL + _GAP) - _GAP + _MARGIN
    canvas = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, row in enumerate(panels[0].rows):
        y = _MARGIN + _HEADER + number * (_CELL + _GAP) + _CELL / 2
        pen.multiline_text((_MARGIN, y), row.label, fill=_INK, font=_font(16), anchor="lm", spacing=5)
    left = _MARGIN + _LABEL
    for panel in panels:
        _draw_panel(canvas, pen, panel, left)
        left += panel.width + 2 * _GAP + _MARGIN
    return canvas


def _draw_panel(canvas: Image.Image, pen: ImageDraw.ImageDraw, panel: Panel, left: int) -> None:
    pen.text((left, _MARGIN - 6), panel.title, fill=_INK, font=_font(20))
    pen.text((left, _MARGIN + 22), panel.note, fill=_MUTED, font=_font(14))
    for number, row in enumerate(panel.rows):
        y = _MARGIN + _HEADER + number * (_CELL + _GAP)
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                x = left + column * (_CELL + _GAP)
                pen.rounded_rectangle((x - 2, y - 2, x + _CELL + 1, y + _CELL + 1), 6, fill=_CARD)
                canvas.paste(picture.convert("RGB").resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, y))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
