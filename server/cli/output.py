"""What commands say: results on stdout, for people or as JSON; progress and errors on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

# Wide enough for a table of names and hashes in a pipe, where there is no terminal to ask.
_PIPE_WIDTH = 160


class Output:
    """Where a command writes. With `as_json`, stdout carries JSON and nothing else."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.stdout = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
        self.stderr = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH, highlight=False)

    @property
    def interactive(self) -> bool:
        """True if progress can be drawn."""
        return self.stderr.is_terminal

    def result(self, value: Any, shown: RenderableType) -> None:
        """Write a result: `value` as one JSON document, or `shown` for people."""
        if self.as_json:
            self.stdout.file.write(json.dumps(plain(value), indent=2) + "\n")
        else:
            self.stdout.print(shown)

    def event(self, value: Mapping[str, Any], shown: RenderableType | None = None) -> None:
        """Write one of many: `value` as a line of JSON, or `shown`, if anything, for people."""
        if self.as_json:
            self.stdout.file.write(json.dumps(plain(value)) + "\n")
            self.stdout.file.flush()
        elif shown is not None:
            self.stdout.print(shown)

    def note(self, text: str) -> None:
        """Say something on the side, to people only."""
        if not self.as_json:
            self.stderr.print(escape(text), style="dim")

    def error(
        self, message: str, *, code: str = "", fields: Sequence[tuple[str, str]] = (), advice: str = "", **more: Any
    ) -> None:
        """Say what was wrong in one red line, which fields were, and what to do; under `--json` as one JSON line."""
        if self.as_json:
            listed = [{"field": name, "description": text} for name, text in fields]
            told = {"message": message, "code": code, "fields": listed, "advice": advice, **more}
            self.stderr.file.write(json.dumps({"error": told}) + "\n")
            return
        tail = f" [dim]({escape(code)})[/dim]" if code else ""
        self.stderr.print(f"[bold red]Error:[/bold red] [red]{escape(message)}[/red]{tail}", soft_wrap=True)
        for name, text in fields:
            if text not in message:
                self.stderr.print(f"  [yellow]{escape(name)}[/yellow]: {escape(text)}", soft_wrap=True)
        if advice:
            self.stderr.print(f"  {escape(advice)}", soft_wrap=True)


def plain(value: Any) -> Any:
    """Return a record as plain data for JSON; bytes are told by their size only."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        identity = getattr(value, "id", None)
        return named if identity is None else {"id": identity, **named}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    return value


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Return names and values side by side; what is None or empty is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value not in (None, "", (), {}):
            table.add_row(name, escape(str(value)))
    return table


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of rows."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def size_text(count: int) -> str:
    """Return bytes in the unit that fits."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{count} B"


def time_text(moment: datetime | None) -> str:
    """Return a time in the local zone, to the second."""
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
