"""Rows, tables, strips and grids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hueshift.training.evaluation.grids import GridRow, draw_grid, read_strip, write_strip
from hueshift.training.evaluation.rows import append_row, read_rows
from hueshift.training.evaluation.tables import missing_words, report, summary_table

RED, BLUE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (32, 16), "blue")


def row(cell: str, **more: Any) -> dict[str, Any]:
    return {"cell": cell, "case": "fox", "kind": "live", "method": "lora", "budget": "9 steps", "seed": 0, **more}


def test_the_newest_row_of_a_cell_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert read_rows(path) == []
    for number, cell in enumerate("aba"):
        append_row(path, {"cell": cell, "number": number})
    assert read_rows(path) == [{"cell": "a", "number": 2}, {"cell": "b", "number": 1}]


def test_a_line_left_half_written_is_no_row_and_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"cell": "a"}\n{"cell": "b", "val')
    assert read_rows(path) == [{"cell": "a"}]
    append_row(path, {"cell": "c"})
    assert [json.loads(line)["cell"] for line in path.read_text().splitlines()] == ["a", "c"]
    path.write_text('{"cell"\n{"cell": "b"}\n')
    with pytest.raises(ValueError, match="delimiter"):
        read_rows(path)


def test_tables_are_means_over_cases_and_tell_failures() -> None:
    rows = [
        row("0", method="base", budget=None, measures={"clip_i": 0.1}),
        row("1", measures={"clip_i": 0.2, "prior": 0.9}, steps=9, step_seconds=0.5, bytes=2000),
        row("2", case="robot", measures={"clip_i": 0.4, "prior": 0.7}, steps=9, step_seconds=1.5, bytes=4000),
        row("3", case="guitar", error="training diverged", steps=None),
        row("4", budget="60 s", measures={"clip_i": 0.9}),
        row("5", kind="style", case="ink", measures={"clip_i": 0.8}),
    ]
    lines = summary_table(rows, "9 steps", style=False)
    assert lines[0] == "| method | CLIP-I | prior kept | steps | s a step | s to train | size | cells |"
    assert lines[2:] == [
        "| base | 0.100 | – | – | – | – | – | 1 |",
        "| lora | 0.300 | 0.800 | 9 | 1.00 | 9 | 3 kB | 3, 1 diverged |",
    ]
    page = report(rows, "A comparison")
    assert page.index("subjects: 9 steps") < page.index("styles: 9 steps") < page.index("subjects: 60 s")
    assert "styles: 60 s" not in page or "| lora" in page
    assert "DINO was not measured" in page
    assert missing_words([row("6", measures={"dino": 0.5})]) == ""


def test_a_strip_gives_its_pictures_back(tmp_path: Path) -> None:
    path = tmp_path / "strips" / "one.png"
    assert read_strip(path) == []
    write_strip(path, [RED, BLUE, RED])
    back = read_strip(path)
    assert [picture.size for picture in back] == [(16, 16)] * 3
    assert [picture.getpixel((8, 8)) for picture in back] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]


def test_a_grid_has_a_place_for_every_picture() -> None:
    rows = [GridRow("first", [RED, None]), GridRow("second", [BLUE, RED], "a note")]
    grid = np.asarray(draw_grid(rows, ["left", "right"], cell=40))
    red = (grid == (255, 0, 0)).all(-1)
    blue = (grid == (0, 0, 255)).all(-1)
    assert (red.sum(), blue.sum()) == (2 * 40 * 40, 40 * 40)
    first, second = np.argwhere(red)[0], np.argwhere(blue)[0]
    assert second[0] - first[0] == 44
    assert second[1] == first[1]
