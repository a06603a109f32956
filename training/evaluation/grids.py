"""Grids of pictures, with labels and headings; and strips, which keep the pictures of a cell in one file."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from hueshift.engines.cache_files import write_atomically

_GAP, _MARGIN, _LABEL, _HEADING = 4, 12, 130, 46
_INK, _MUTED, _PAPER = (28, 30, 38), (96, 100, 112), (255, 255, 255)
_TEXT_SIZE, _LINE = 12, 15


@dataclass(frozen=True, slots=True)
class GridRow:
    """A row: `label`, with what `note` says below it, and pictures. None leaves a cell empty."""

    label: str
    pictures: Sequence[Image.Image | None]
    note: str = ""


def draw_grid(rows: Sequence[GridRow], headings: Sequence[str], cell: int = 96) -> Image.Image:
    """Draw rows of pictures, each scaled to `cell` pixels, under their headings."""
    columns = max([len(headings), *(len(row.pictures) for row in rows)])
    top = _MARGIN + (_HEADING if headings else 0)
    width = _MARGIN + _LABEL + columns * (cell + _GAP) + _MARGIN
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + _GAP) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(canvas)
    # Letters of this font are about half as wide as high.
    letters = cell * 2 // _TEXT_SIZE
    for number, heading in enumerate(headings):
        left = _MARGIN + _LABEL + number * (cell + _GAP)
        _write(pen, (left, _MARGIN), textwrap.wrap(heading, letters)[:3], _MUTED)
    for number, row in enumerate(rows):
        y = top + number * (cell + _GAP)
        lines = textwrap.wrap(row.label, _LABEL * 2 // _TEXT_SIZE)
        _write(pen, (_MARGIN, y + 4), lines, _INK)
        _write(pen, (_MARGIN, y + 4 + _LINE * len(lines)), row.note.splitlines(), _MUTED)
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                shown = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
                canvas.paste(shown, (_MARGIN + _LABEL + column * (cell + _GAP), y))
    return canvas


def write_strip(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Keep pictures side by side in one PNG, their middle squares as high as the first."""
    side = pictures[0].height
    strip = Image.new("RGB", (side * len(pictures), side), _PAPER)
    for number, picture in enumerate(pictures):
        strip.paste(ImageOps.fit(picture.convert("RGB"), (side, side)), (side * number, 0))
    write_atomically(path, lambda file: strip.save(file, "PNG"))


def read_strip(path: Path) -> list[Image.Image]:
    """Pictures of a strip; none where there is no file."""
    if not path.is_file():
        return []
    with Image.open(path) as strip:
        side = strip.height
        return [strip.crop((left, 0, left + side, side)).convert("RGB") for left in range(0, strip.width, side)]


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], lines: Sequence[str], ink: tuple[int, ...]) -> None:
    font = ImageFont.load_default(_TEXT_SIZE)
    for number, line in enumerate(lines):
        pen.text((place[0], place[1] + _LINE * number), line, fill=ink, font=font)
