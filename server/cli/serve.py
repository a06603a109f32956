"""`hueshift serve`: start a server; with no settings, the embedded default."""

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from hueshift.adapters.errors import HueshiftError
from hueshift.server.addresses import Addresses, bracket, is_loopback
from hueshift.server.cli.output import Output
from hueshift.server.logs import configure_logs
from hueshift.server.settings import Settings, load_settings


def serve(
    config: Annotated[Path | None, typer.Option(dir_okay=False, help="TOML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind, or unix:/path. [server.host]")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0 picks a free one. [server.port]")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus port; 0: a free one. [server.metrics_port]")
    ] = None,
    model: Annotated[Path | None, typer.Option(file_okay=False, help="Base model's folder. [model.path]")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, onnxruntime, torch or tensorrt. [engine.kind]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda[:N]. [engine.device]")] = None,
    store: Annotated[Path | None, typer.Option(file_okay=False, help="Folder of all that stays. [store.path]")] = None,
    workers: Annotated[int | None, typer.Option(help="Fine-tuning processes. [training.workers]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say the addresses as one line of JSON.")] = False,
    supervised: Annotated[bool, typer.Option(hidden=True, help="Settings and life come from standard input.")] = False,
    node_address: Annotated[str, typer.Option(hidden=True, help="Address of the node, told to front ends.")] = "",
) -> None:
    """Start a server and run it until SIGTERM or Ctrl-C; a second one does not wait for calls to finish.

    Every option is also a setting, named in brackets: in the TOML file, or as HUESHIFT_SERVER__PORT=50051 in the
    environment. Options win over the environment, which wins over the file.
    """
    output = Output(as_json)
    given: dict[str, dict[str, Any]] = {
        "server": {"host": host, "port": port, "metrics_port": metrics_port},
        "model": {"path": model},
        "engine": {"kind": engine, "device": device},
        "store": {"path": store},
        "training": {"workers": workers},
    }
    chosen = {name: {key: value for key, value in part.items() if value is not None} for name, part in given.items()}
    try:
        if supervised:
            settings = _on_node(Settings.model_validate_json(sys.stdin.readline()), node_address)
        else:
            found = load_settings(config, **{name: part for name, part in chosen.items() if part})
            settings = _for_people(found, output)
        configure_logs(settings.log)
        _run(settings, output, sys.stdin.fileno() if supervised else None)
    except HueshiftError as error:
        output.error(error.message, code=error.reason.value)
        raise typer.Exit(1) from error


def _run(settings: Settings, output: Output, parent: int | None) -> None:
    # gRPC's core writes to standard error in a format of its own, which would break the log's lines of JSON; what it
    # tells of, a port that cannot be bound for example, comes as an error of ours too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Threads that spin while they wait take the cores from the workers beside them (server/supervisor.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported here: these bring torch, and a wrong option should be told at once.
    from hueshift.server import serve as server

    with stage_bars(output) as bars:

        def ready(addresses: Addresses) -> None:
            bars.stop()
            told = {"grpc": addresses.grpc, "metrics": addresses.metrics}
            output.event(told, f"Hueshift serves gRPC on {addresses.grpc}, metrics on {addresses.metrics}")

        asyncio.run(server.serve(settings, ready=ready, progress=bars.update, parent=parent))
    if any(thread.name == server.WARM_UP_THREAD for thread in threading.enumerate()):
        # Stopped during the warm-up, whose thread cannot be stopped: the interpreter's own end would pull the ground
        # from under it. Nothing is left to be written.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Bars:
    """One bar per stage of the warm-up, on a terminal only. `update` comes from the warm-up's thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, what: str, done: int, of: int) -> None:
        """Move the bar of a stage."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=of)
        self._progress.update(self._tasks[what], completed=done, total=of)

    def stop(self) -> None:
        """Take the bars away."""
        self._progress.stop()


@contextmanager
def stage_bars(output: Output) -> Iterator[_Bars]:
    """Bars on stderr while the block runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=output.stderr, transient=True, disable=not output.interactive)
    with progress:
        yield _Bars(progress)


def _for_people(settings: Settings, output: Output) -> Settings:
    """Log for people on a terminal, unless the settings say something else."""
    if not output.interactive or "json_lines" in settings.log.model_fields_set:
        return settings
    return settings.model_copy(update={"log": settings.log.model_copy(update={"json_lines": False})})


def _on_node(settings: Settings, address: str) -> Settings:
    """Tell front ends the node's own address, where the settings bind every address and name none."""
    if not address or settings.cluster.advertise or is_loopback(settings.server.host):
        return settings
    cluster = settings.cluster.model_copy(update={"advertise": f"{bracket(address)}:0"})
    return settings.model_copy(update={"cluster": cluster})
