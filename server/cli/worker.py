"""`hueshift worker`: one fine-tuning process. `hueshift serve` starts its own; more can run beside it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hueshift.adapters.errors import HueshiftError, InvalidArgument, Reason
from hueshift.server.devices import check_devices, worker_environment
from hueshift.server.failpoints import Failpoint
from hueshift.server.logs import configure_logs
from hueshift.server.settings import Settings, load_settings, serving_device
from hueshift.server.stop import StopFlag


def worker(
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    owner: Annotated[str, typer.Option(help="Name of this worker in the job table; made up by default.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda:N. The worker sees no other GPU.")] = "cpu",
    supervised: Annotated[bool, typer.Option(hidden=True, help="Settings and life come from standard input.")] = False,
    failpoint: Annotated[str, typer.Option(hidden=True, envvar="HUESHIFT_FAILPOINT", help="For tests.")] = "",
) -> None:
    """Take fine-tuning jobs from the store and train them, until SIGTERM or Ctrl-C."""
    stop = StopFlag()
    stop.on_signals()
    try:
        settings = _read_settings() if supervised else load_settings(config)
        configure_logs(settings.log)
        if supervised:
            stop.on_closed(sys.stdin.fileno())
        else:
            _pin(device, settings)
        # Imported here, with the environment set: CUDA reads it when torch first looks for devices.
        from hueshift.server.worker_process import run_worker

        run_worker(settings, stop=stop, owner=owner, device=device, failpoint=Failpoint.parse(failpoint))
    except HueshiftError as error:
        typer.echo(f"hueshift worker: {error.message}", err=True)
        # As of every command: 2 is for options that are wrong by themselves.
        raise typer.Exit(1) from error


def _pin(device: str, settings: Settings) -> None:
    """Let this process see its device alone. A supervised worker was started that way."""
    chosen = None if device == "cpu" else device
    try:
        check_devices(() if chosen is None else (chosen,), serving_device(settings.engine, settings.cluster))
        os.environ.update(worker_environment(chosen, os.environ))
    except ValueError as error:
        raise InvalidArgument.for_field("--device", str(error), Reason.SETTINGS_INVALID) from error


def _read_settings() -> Settings:
    return Settings.model_validate_json(sys.stdin.readline())


def main() -> None:
    """Entry of the processes that the supervisor starts."""
    typer.run(worker)


if __name__ == "__main__":
    main()
