"""Rows of results: one JSON object a line, appended as soon as it is known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The newest row of every cell, in the order in which cells first appear. A file that is not there has none.

    A last line that a stopped process left half written is no row.
    """
    newest: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines) - 1:
                raise
            continue
        newest[row["cell"]] = row
    return list(newest.values())


def append_row(path: Path, row: Row) -> None:
    """Add a row, after cutting off a line that was left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
