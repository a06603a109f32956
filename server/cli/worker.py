"""`hueshift worker`: one fine-tuning process. `hueshift serve` starts its own; more can run beside it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hueshift.adapters.errors import HueshiftError
from hueshift.server.failpoints import Failpoint
from hueshift.server.logs import configure_logs
from hueshift.server.settings import Settings, load_settings
from hueshift.server.stop import StopFlag
from hueshift.server.worker_process import run_worker


def worker(
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    owner: Annotated[str, typer.Option(help="Name of this worker in the job table; made up by default.")] = "",
    supervised: Annotated[bool, typer.Option(hidden=True, help="Settings and life come from standard input.")] = False,
    failpoint: Annotated[str, typer.Option(hidden=True, envvar="HUESHIFT_FAILPOINT", help="For tests.")] = "",
) -> None:
    """Take fine-tuning jobs from the store and train them, until SIGTERM."""
    stop = StopFlag()
    stop.on_signals()
    try:
        settings = _read_settings() if supervised else load_settings(config)
        configure_logs(settings.log)
        if supervised:
            stop.on_closed(sys.stdin.fileno())
        run_worker(settings, stop=stop, owner=owner, failpoint=Failpoint.parse(failpoint))
    except HueshiftError as error:
        typer.echo(f"hueshift worker: {error.message}", err=True)
        raise typer.Exit(2) from error


def _read_settings() -> Settings:
    return Settings.model_validate_json(sys.stdin.readline())


def main() -> None:
    """Entry of the processes that the supervisor starts."""
    typer.run(worker)


if __name__ == "__main__":
    main()
