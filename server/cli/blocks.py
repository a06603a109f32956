"""Pictures in a terminal, two pixels per character cell: the upper half block in one colour on the other."""

import io

from PIL import Image
from rich.text import Text


def picture_text(data: bytes, columns: int) -> Text:
    """Return a picture file drawn `columns` characters wide, in true colour."""
    with Image.open(io.BytesIO(data)) as picture:
        height = max(2, round(columns * picture.height / picture.width / 2) * 2)
        small = picture.convert("RGB").resize((columns, height), Image.Resampling.BOX)
    pixels = small.tobytes()
    text = Text(no_wrap=True, end="")
    for row in range(0, height, 2):
        for column in range(columns):
            top = 3 * (row * columns + column)
            bottom = top + 3 * columns
            upper, lower = (",".join(map(str, pixels[at : at + 3])) for at in (top, bottom))
            text.append("\u2580", f"rgb({upper}) on rgb({lower})")
        text.append("\n")
    return text
