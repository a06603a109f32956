"""`hueshift cluster`: let Ray place engine replicas and training workers, and see what became of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hueshift.server.cli.output import Output, rows_table

app = typer.Typer(help="Place engine replicas and training workers on a Ray cluster.", no_args_is_help=True)
Config = Annotated[Path | None, typer.Option(dir_okay=False, help="TOML file of settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(config: Config = None) -> None:
    """Keep the cluster as the settings ask, until SIGTERM; what was placed stays and is found again."""
    from hueshift.server.cluster.driver import run_driver
    from hueshift.server.logs import configure_logs
    from hueshift.server.settings import load_settings
    from hueshift.server.stop import StopFlag

    settings = load_settings(config)
    configure_logs(settings.log)
    stop = StopFlag()
    stop.on_signals()
    run_driver(settings, stop)


@app.command()
def status(config: Config = None, as_json: AsJson = False) -> None:
    """Show every actor, where it is, and the process it keeps."""
    from hueshift.server.cluster.driver import Driver, connect
    from hueshift.server.logs import configure_logs
    from hueshift.server.settings import load_settings

    settings = load_settings(config)
    configure_logs(settings.log)
    output = Output(as_json)
    ray = connect(settings)
    try:
        rows = Driver(ray, settings).statuses()
    finally:
        ray.shutdown()
    _show(output, rows, ("name", "node", "pid", "starts"))


@app.command()
def down(config: Config = None, as_json: AsJson = False) -> None:
    """Let every actor drain, then remove it. Jobs go back to the queue with their checkpoints."""
    import time

    from hueshift.server.cluster.driver import Driver, connect
    from hueshift.server.logs import configure_logs
    from hueshift.server.settings import load_settings

    settings = load_settings(config)
    configure_logs(settings.log)
    output = Output(as_json)
    ray = connect(settings)
    try:
        driver = Driver(ray, settings)
        removed = left = driver.reconcile(down=True)[2]
        while left:
            time.sleep(0.5)
            left = driver.reconcile(down=True)[2]
    finally:
        ray.shutdown()
    output.result({"removed": removed}, f"removed {removed} actors")


@app.command("dead-letters")
def dead_letters(config: Config = None, as_json: AsJson = False) -> None:
    """Show the jobs of all tenants that were given up, with the cause of every attempt. Reads the database."""
    from hueshift.server.clock import SystemClock
    from hueshift.server.settings import load_settings
    from hueshift.server.store.stores import open_stores

    settings = load_settings(config)
    output = Output(as_json)
    stores = open_stores(settings, SystemClock())
    try:
        rows = [
            {"job": job.job_id, "tenant": job.tenant, "attempt": entry["attempt"], "cause": entry["cause"]}
            for job in stores.jobs.dead_letters()
            for entry in job.failures
        ]
    finally:
        stores.close()
    _show(output, rows, ("job", "tenant", "attempt", "cause"))


def _show(output: Output, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    shown = [["-" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    output.result(rows, rows_table(columns, shown))
