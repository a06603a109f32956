"""Commands and programs that the pages and the deployment files show are those that exist."""

import ast
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from hueshift.server.cli.main import COMMANDS

PROJECT = Path(__file__).resolve().parent.parent
MARKDOWN = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
PAGES = [*MARKDOWN, PROJECT / "Dockerfile", *sorted((PROJECT / "deploy").rglob("*.yaml"))]
_SHOWN = re.compile(rf"\bhueshift ((?:{'|'.join(COMMANDS)})\b[^`\n#|]*)")
_OPTION = re.compile(r"(?<!\S)--?[a-z][a-z-]*")


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every command, by its words."""
    found: dict[str, set[str]] = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        found[" ".join(path)] = {name for given in command.params for name in (*given.opts, *given.secondary_opts)}
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*path, name))

    for name, lazy in COMMANDS.items():
        loaded = getattr(import_module(lazy.module), lazy.attribute)
        if not isinstance(loaded, typer.Typer):
            function, loaded = loaded, typer.Typer(add_completion=False)
            loaded.command(name)(function)
        walk(typer.main.get_command(loaded), (name,))
    return found


def _wrong(shown: str, options: Mapping[str, set[str]]) -> list[str]:
    """What of a command that is shown does not exist."""
    words = shown.split()
    known = [" ".join(words[:count]) for count in range(1, len(words) + 1) if " ".join(words[:count]) in options]
    return [option for option in _OPTION.findall(shown) if option not in options[known[-1]] | {"--help", "-h"}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_commands_have_the_options_that_are_shown(page: Path, options: Mapping[str, set[str]]) -> None:
    text = re.sub(r"\\\n\s*#?", " ", page.read_text(encoding="utf-8"))
    wrong = {shown: found for shown in _SHOWN.findall(text) if (found := _wrong(shown, options))}
    assert not wrong


def test_a_wrong_option_is_found(options: Mapping[str, set[str]]) -> None:
    assert _wrong("keys create --tenant acme", options) == ["--tenant"]
    assert _wrong("keys create acme --label app --json", options) == []


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(PROJECT)))
def test_programs_are_whole_and_import_what_exists(page: Path) -> None:
    for program in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hueshift."):
                module = import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
