"""A group of commands whose code is loaded when it is called: `--help` must not wait for a server's imports."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True, slots=True)
class Lazy:
    """A command: a function or Typer app named `attribute` in `module`. `summary` is its line in the help."""

    module: str
    attribute: str
    summary: str


def lazy_group(commands: dict[str, Lazy]) -> type[TyperGroup]:
    """Return a group class that lists `commands` by their summaries and loads only the one that is called."""

    class _LazyGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(commands)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in commands:
                return None
            return TyperCommand(cmd_name, help=commands[cmd_name].summary)

        def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
            name, command, rest = super().resolve_command(ctx, args)
            return name, _load(name, commands[name]) if name in commands else command, rest

    return _LazyGroup


def _load(name: str, lazy: Lazy) -> Any:
    found: typer.Typer | Callable[..., Any] = getattr(import_module(lazy.module), lazy.attribute)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False)
        found.command(name)(function)
    found.pretty_exceptions_enable = False
    command = typer.main.get_command(found)
    command.name = name
    return command
