"""From one schema version to the next, in place, in the transaction that opens the database.

A server of the older version that still runs on the same database must be stopped first: it checks the version only
when it starts.
"""

from collections.abc import Callable, Mapping

from sqlalchemy import Connection, Table, text, update
from sqlalchemy.schema import CreateColumn

from hueshift.server.store import tables


def migrate(connection: Connection, version: int) -> None:
    """Bring the tables from `version` to the newest one. The caller holds the lock of the schema."""
    for step in range(version, tables.SCHEMA_VERSION):
        _STEPS[step](connection)
    connection.execute(update(tables.schema).values(version=tables.SCHEMA_VERSION))


def can_migrate(version: int) -> bool:
    """True if every step from `version` on is known."""
    return all(step in _STEPS for step in range(version, tables.SCHEMA_VERSION)) and version < tables.SCHEMA_VERSION


def _to_2(connection: Connection) -> None:
    """Count device seconds, keep the causes of failures, list the replicas."""
    _add_column(connection, tables.jobs, "device_seconds", "DEFAULT 0 ")
    _add_column(connection, tables.jobs, "charged")
    _add_column(connection, tables.jobs, "failures")
    tables.usage.create(connection)
    tables.replicas.create(connection)


def _to_3(connection: Connection) -> None:
    """Find lost leases, old samples and pinned adapters without reading every row."""
    for index in (*tables.jobs.indexes, tables.samples_by_age, tables.pinned_adapters):
        index.create(connection, checkfirst=True)


def _to_4(connection: Connection) -> None:
    """Note which revisions are in use and what pictures take, find by age what may go, take turns at removing it."""
    _add_column(connection, tables.revisions, "used")
    _add_column(connection, tables.jobs, "picture_bytes", "DEFAULT 0 ")
    for index in (*tables.jobs.indexes, tables.loose_events_by_age):
        index.create(connection, checkfirst=True)
    tables.turns.create(connection)


def _to_5(connection: Connection) -> None:
    """Count a tenant's open jobs and stored bytes without reading all its rows."""
    for index in (*tables.jobs.indexes, *tables.revisions.indexes):
        index.create(connection, checkfirst=True)


def _add_column(connection: Connection, table: Table, name: str, default: str = "") -> None:
    definition = str(CreateColumn(table.c[name]).compile(dialect=connection.dialect))
    # A column that may not be empty needs a value for the rows that are there.
    definition = definition.replace("NOT NULL", f"{default}NOT NULL")
    connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))


_STEPS: Mapping[int, Callable[[Connection], None]] = {1: _to_2, 2: _to_3, 3: _to_4, 4: _to_5}
