"""`hueshift keys`: API keys, made on the server's machine, in the store's own database."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from hueshift.adapters.errors import HueshiftError
from hueshift.server.cli.output import Output, facts_table, rows_table, time_text
from hueshift.server.clock import SystemClock
from hueshift.server.settings import load_settings
from hueshift.server.store.database import Database
from hueshift.server.store.keys import KeyRecord, KeyStore

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Create, list and revoke API keys, on the server's machine."
)

Config = Annotated[Path | None, typer.Option(help="TOML file of settings.", dir_okay=False)]
Store = Annotated[Path | None, typer.Option(help="Folder of the database and the adapter files.", file_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]


@app.command("create")
def create(
    tenant: Annotated[str, typer.Argument(help="Tenant the key speaks for: a-z, 0-9 and '-'.")],
    label: Annotated[str, typer.Option(help="What the key is for, for people.")] = "",
    config: Config = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show its secret, once. From the first key on, every call to the server needs one."""
    with _keys(config, store, as_json) as (keys, output):
        key_id, secret = keys.create(tenant, label)
        facts = {"key_id": key_id, "tenant": tenant, "label": label, "secret": secret}
        output.result(facts, facts_table(facts))
        output.note("Keep the secret: it is stored as a hash and cannot be shown again.")


@app.command("list")
def list_keys(config: Config = None, store: Store = None, as_json: AsJson = False) -> None:
    """List the keys, oldest first, without their secrets."""
    with _keys(config, store, as_json) as (keys, output):
        found = keys.list()
        output.result([_plain(key) for key in found], rows_table(_COLUMNS, [_row(key) for key in found]))
        if not found:
            output.note("No keys: the server answers local callers only. `hueshift keys create TENANT` makes one.")


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as in the list.")],
    config: Config = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a key invalid; running servers refuse it within a second."""
    with _keys(config, store, as_json) as (keys, output):
        if not keys.revoke(key_id):
            output.error(f"there is no valid key {key_id!r}", advice="`hueshift keys list` shows the keys.")
            raise typer.Exit(1)
        output.result({"key_id": key_id, "revoked": True}, f"revoked {key_id}")


_COLUMNS = ("key", "tenant", "label", "created", "revoked")


@contextmanager
def _keys(config: Path | None, store: Path | None, as_json: bool) -> Iterator[tuple[KeyStore, Output]]:
    output = Output(as_json)
    clock = SystemClock()
    try:
        overrides = {} if store is None else {"store": {"path": store}}
        database = Database(load_settings(config, **overrides).store.database, clock)
        try:
            yield KeyStore(database, clock), output
        finally:
            database.close()
    except HueshiftError as error:
        output.error(
            error.message, code=error.reason.value, fields=[(v.field, v.description) for v in error.violations]
        )
        raise typer.Exit(1) from error


def _plain(key: KeyRecord) -> dict[str, object]:
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "label": key.label,
        "created": _time(key.created),
        "revoked": _time(key.revoked),
    }


def _row(key: KeyRecord) -> tuple[str, ...]:
    return (key.key_id, key.tenant, key.label, time_text(_time(key.created)), time_text(_time(key.revoked)))


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, tz=UTC)
