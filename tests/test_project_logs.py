"""docs/logs.md has every event of the log with its level, and no other."""

import ast
import re
from collections import defaultdict
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = ("adapters", "engines", "training", "server")
LEVELS = {"debug", "info", "warning", "error", "critical"}
ALIASES = {"say": {"info"}, "log": {"info", "error"}}


def _sources() -> list[ast.Module]:
    files = sorted(path for folder in SOURCES for path in (PROJECT / folder).rglob("*.py"))
    return [ast.parse(path.read_text(encoding="utf-8")) for path in files]


def _logged(trees: list[ast.Module]) -> dict[str, set[str]]:
    """Events that are written as literals, with their levels."""
    found: dict[str, set[str]] = defaultdict(set)
    for call in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not call.args or not isinstance(call.args[0], ast.Constant):
            continue
        if isinstance(call.func, ast.Attribute) and "log" in ast.unparse(call.func.value).lower():
            levels = {call.func.attr} & LEVELS
        else:
            levels = ALIASES.get(ast.unparse(call.func), set())
        if levels:
            found[str(call.args[0].value)] |= levels
    return found


def _told() -> dict[str, set[str]]:
    """Events of the page, with their levels."""
    text = (PROJECT / "docs" / "logs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", text, re.MULTILINE)
    return {event: set(levels.split(", ")) for events, levels in rows for event in re.findall(r"`([^`]+)`", events)}


def test_the_page_has_every_event_with_its_level_and_no_other() -> None:
    trees, told = _sources(), _told()
    logged = _logged(trees)
    assert len(logged) > 80
    assert {event: levels for event, levels in logged.items() if told.get(event) != levels} == {}
    # Some are handed to a function that logs them.
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert told.keys() - logged.keys() - texts == set()
