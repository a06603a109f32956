"""Tables of an older version are brought up to date in place, with the rows they hold, on both databases."""

from pathlib import Path

import pytest
from fake_clock import FakeClock
from postgres import fresh_database
from small_jobs import small_spec
from sqlalchemy import inspect, select, text, update
from sqlalchemy.dialects import sqlite

from hueshift.server.store.adapter_rows import pinned as pinned_query
from hueshift.server.store.database import Database
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.tables import SCHEMA_VERSION, metadata, schema


@pytest.fixture(params=["sqlite", "postgres"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where an empty database may be made."""
    if request.param == "sqlite":
        return tmp_path / "hueshift.db"
    return fresh_database(request.getfixturevalue("postgres_server"), "migrated")


def go_back_to_version_1(database: Database) -> None:
    with database.write() as connection:
        added = ("jobs_by_losses", "samples_by_age", "pinned_adapters", "jobs_by_end", "loose_events_by_age")
        for index in (*added, "jobs_by_tenant_and_state", "revisions_by_size"):
            connection.execute(text(f"DROP INDEX {index}"))
        for column in ("device_seconds", "charged", "failures", "picture_bytes"):
            connection.execute(text(f"ALTER TABLE jobs DROP COLUMN {column}"))
        connection.execute(text("ALTER TABLE revisions DROP COLUMN used"))
        connection.execute(text("DROP TABLE turns"))
        connection.execute(text("DROP TABLE usage"))
        connection.execute(text("DROP TABLE replicas"))
        connection.execute(update(schema).values(version=1))


def test_version_1_becomes_the_newest(location: str | Path) -> None:
    clock = FakeClock()
    database = Database(location, clock)
    JobStore(database, clock).create(NewJob("ft-1", "alice", small_spec(), "fox", "Fox", {}), tenant_limit=1)
    go_back_to_version_1(database)
    database.close()

    database = Database(location, clock)
    with database.read() as connection:
        assert connection.scalar(select(schema.c.version)) == SCHEMA_VERSION
        columns = {table: {c["name"] for c in inspect(connection).get_columns(table)} for table in metadata.tables}
        indexes = {index["name"] for table in metadata.tables for index in inspect(connection).get_indexes(table)}
    assert {index.name for table in metadata.tables.values() for index in table.indexes} <= indexes
    assert columns == {name: {column.name for column in table.c} for name, table in metadata.tables.items()}
    jobs = JobStore(database, clock)
    claimed = jobs.claim("worker", 30.0)
    assert claimed is not None
    assert (claimed.job.job_id, claimed.job.device_seconds, claimed.job.failures) == ("ft-1", 0.0, [])
    clock.now += 4
    assert jobs.release(claimed.lease).device_seconds == 4.0
    assert jobs.get("alice", "ft-1").state is JobState.QUEUED
    database.close()


def test_what_is_asked_all_the_time_reads_an_index(tmp_path: Path) -> None:
    database = Database(tmp_path / "hueshift.db", FakeClock())
    asked = {
        "SELECT sum(leases_lost) FROM jobs WHERE leases_lost > 0": "jobs_by_losses",
        "SELECT state, count(*) FROM jobs GROUP BY state": "jobs_to_claim",
        "SELECT 1 FROM job_events WHERE data IS NOT NULL AND time < 5": "samples_by_age",
        "SELECT count(*) FROM jobs WHERE tenant = 'a' AND state IN ('queued', 'running')": "jobs_by_tenant_and_state",
        "SELECT DISTINCT content_hash, size_bytes FROM revisions WHERE tenant = 'a'": "revisions_by_size",
        str(pinned_query().compile(dialect=sqlite.dialect())): "pinned_adapters",
    }
    with database.read() as connection:
        for query, index in asked.items():
            plan = " ".join(str(row) for row in connection.execute(text(f"EXPLAIN QUERY PLAN {query}")))
            assert index in plan, plan
    database.close()
