"""`hueshift`: one program for the server, its workers and its callers.

Exit codes: 0 done, 1 an error (said on stderr), 2 wrong usage, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from hueshift.server.cli.lazy import Lazy, lazy_group

_CLI = "hueshift.server.cli"
COMMANDS = {
    "serve": Lazy(f"{_CLI}.serve", "serve", "Start a server; with no settings, the embedded default."),
    "worker": Lazy(f"{_CLI}.worker", "worker", "Start a fine-tuning worker beside a server's store."),
    "cluster": Lazy(f"{_CLI}.cluster", "app", "Place replicas and workers on a Ray cluster; show what was given up."),
    "generate": Lazy(f"{_CLI}.generate", "generate", "Draw pictures from a prompt, with any mix of adapters."),
    "finetune": Lazy(f"{_CLI}.finetune", "finetune", "Learn an adapter from a few pictures."),
    "evaluate": Lazy(f"{_CLI}.evaluate", "app", "Measure adapters, or compare ways to learn them, with grids."),
    "adapters": Lazy(f"{_CLI}.adapters", "app", "List, show, import, export, combine, inspect and delete adapters."),
    "jobs": Lazy(f"{_CLI}.jobs", "app", "List, show, watch, cancel, retry and delete fine-tuning jobs."),
    "keys": Lazy(f"{_CLI}.keys", "app", "Create, list and revoke API keys, on the server's machine."),
    "engine": Lazy(
        f"{_CLI}.engine", "app", "Build, list, inspect, verify and prune TensorRT plans, on the GPU's machine."
    ),
    "health": Lazy(f"{_CLI}.health", "health", "Ask whether a server is ready; exits with 1 if not."),
    "model": Lazy(f"{_CLI}.model", "show_model", "Show the base model, its defaults and limits."),
}

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="An image model of their own for every user: hot-swapped adapters on one diffusion model.",
    epilog="Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hueshift {version('hueshift')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options that belong to no command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code. `arguments` default to the process's own."""
    from hueshift.adapters.errors import HueshiftError

    try:
        app(args=None if arguments is None else list(arguments), prog_name="hueshift")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except HueshiftError as error:
        from hueshift.server.cli.output import Output

        Output().error(error.message, code=error.reason.value)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
