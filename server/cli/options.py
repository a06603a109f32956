"""Options that several commands share, or that would make one command's list too long to read."""

import inspect
from collections.abc import Callable
from typing import Any


def gather(declared: Callable[..., None], into: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that `declared` declares by its parameters, passed to it as one dict named `into`."""
    names = list(inspect.signature(declared).parameters)

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            gathered = {name: arguments.pop(name) for name in names}
            command(**arguments, **{into: gathered})

        own = [p for p in inspect.signature(command).parameters.values() if p.name != into]
        present(run, command, [*own, *inspect.signature(declared).parameters.values()])
        return run

    return wrap


def present(run: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Let `run` look to typer like `command` with these parameters."""
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    # By keyword only: then options with and without defaults may come in any order. Typer passes them so.
    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
