"""The database: durable settings, one writer at a time that waits its turn, and no schema but its own."""

import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason, ResourceExhausted, Unavailable
from hueshift.server.clock import SystemClock
from hueshift.server.store import database as database_module
from hueshift.server.store.database import Database, lock, now
from hueshift.server.store.tables import SCHEMA_VERSION, idempotency, revisions, schema

ROW = {"tenant": "acme", "method": "m", "request_hash": "h", "result": {}, "created": 0.0}


def add(database: Database, key: str) -> None:
    with database.write() as connection:
        connection.execute(insert(idempotency).values(key=key, **ROW))


def keys(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.execute(select(idempotency.c.key).order_by(idempotency.c.key)).scalars())


def test_sqlite_runs_with_the_settings_that_survive_a_power_cut(tmp_path: Path) -> None:
    database = Database(tmp_path / "deep" / "hueshift.db", SystemClock())
    with database.read() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
        assert now(connection) == pytest.approx(SystemClock().time(), abs=10)
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 20000}
    assert (tmp_path / "deep").stat().st_mode & 0o077 == 0
    database.close()


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "h.db", SystemClock())
    add(database, "kept")

    def fail() -> None:
        with database.write() as connection:
            connection.execute(insert(idempotency).values(key="lost", **ROW))
            lock(connection, "harmless")
            raise KeyError("lost")

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(IntegrityError):
        add(database, "kept")
    assert keys(database) == ["kept"]
    add(database, "after")
    assert keys(database) == ["after", "kept"]
    database.close()


def test_rows_need_their_parents(tmp_path: Path) -> None:
    database = Database(tmp_path / "h.db", SystemClock())
    numbers = {"revision": 1, "size_bytes": 1, "created": 0.0, "used": None}
    orphan = {column.name: "x" for column in revisions.c} | numbers
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(insert(revisions).values(orphan))
    database.close()


def test_a_reader_sees_one_moment_while_others_write(tmp_path: Path) -> None:
    database = Database(tmp_path / "h.db", SystemClock())
    with database.read() as connection:
        query = select(idempotency.c.key)
        assert connection.execute(query).all() == []
        add(database, "new")
        assert connection.execute(query).all() == []
    assert keys(database) == ["new"]
    database.close()


def test_reopening_keeps_the_rows(tmp_path: Path) -> None:
    first = Database(tmp_path / "h.db", SystemClock())
    add(first, "a")
    first.close()
    again = Database(f"sqlite:///{tmp_path / 'h.db'}", SystemClock())
    assert keys(again) == ["a"]
    again.close()


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, None])
def test_another_schema_is_refused_and_left_alone(tmp_path: Path, version: int | None) -> None:
    file = tmp_path / "h.db"
    database = Database(file, SystemClock())
    with database.write() as connection:
        if version is None:
            connection.execute(text("DROP TABLE schema"))
        else:
            connection.execute(schema.update().values(version=version))
    database.close()
    before = file.read_bytes()
    with pytest.raises(FailedPrecondition, match="schema version") as caught:
        Database(file, SystemClock())
    assert caught.value.reason is Reason.STORE_SCHEMA
    assert str(SCHEMA_VERSION) in caught.value.message
    assert file.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "h.db"
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(FailedPrecondition, match="not a SQLite database") as caught:
        Database(file, SystemClock())
    assert caught.value.reason is Reason.STORE_SCHEMA
    assert file.read_bytes() == b"not a database" * 100


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "nonsense://", "sqlite://", "sqlite:///:memory:"])
def test_unusable_urls_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(InvalidArgument, match="store") as caught:
        Database(url, SystemClock())
    assert caught.value.reason is Reason.SETTINGS_INVALID
    assert "secret" not in caught.value.message


def test_many_threads_read_and_write(tmp_path: Path) -> None:
    database = Database(tmp_path / "h.db", SystemClock())

    def work(worker: int) -> None:
        for n in range(5):
            add(database, f"{worker}-{n}")
            assert f"{worker}-{n}" in keys(database)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(work, range(24)))
    assert len(keys(database)) == 24 * 5
    database.close()


def test_a_writer_that_gets_no_turn_says_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_BUSY_SECONDS", 0.05)
    database = Database(tmp_path / "h.db", SystemClock())
    other = sqlite3.connect(tmp_path / "h.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as caught:
        add(database, "a")
    other.execute("ROLLBACK")
    other.close()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert caught.value.retry_after == 1.0
    # The same within one process, where turns are taken without the database.
    holds, done = threading.Event(), threading.Event()

    def hold() -> None:
        with database.write():
            holds.set()
            done.wait(10)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(hold)
        holds.wait(10)
        with pytest.raises(Unavailable):
            add(database, "b")
        done.set()
        future.result()
    add(database, "c")
    assert keys(database) == ["c"]
    database.close()


def test_a_process_without_a_free_connection_says_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_POOL_SIZE", 1), ("_POOL_OVERFLOW", 0), ("_BUSY_SECONDS", 0.05)):
        monkeypatch.setattr(database_module, name, value)
    database = Database(tmp_path / "h.db", SystemClock())
    with database.read(), pytest.raises(Unavailable) as caught, database.read():
        pass
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    database.close()


def test_a_postgres_that_died_while_it_owes_an_answer_is_given_up_within_seconds() -> None:
    url = make_url("postgresql+psycopg://db/hueshift?keepalives_count=9")
    given = database_module._postgres_arguments(url)
    assert given["keepalives_idle"] + 9 * given["keepalives_interval"] <= 60
    # The operator's own wins.
    assert "keepalives_count" not in given
    assert given["tcp_user_timeout"] == 20_000


@pytest.mark.parametrize("state", ["25006", "57014", "57P02", "53200", "40P01"])
def test_what_passes_by_itself_on_postgres_says_try_again(state: str) -> None:
    class PostgresError(Exception):
        sqlstate = state

    with pytest.raises(Unavailable) as caught, database_module._translated():
        raise DBAPIError("SELECT 1", {}, PostgresError())
    assert caught.value.retry_after == 1.0


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    database = Database(tmp_path / "h.db", SystemClock())

    def fill() -> None:
        with database.write() as connection:
            connection.execute(text("PRAGMA max_page_count = 1"))
            for n in range(200):
                connection.execute(insert(idempotency).values(key="k" * 60 + str(n), **ROW))

    with pytest.raises(ResourceExhausted) as caught:
        fill()
    assert caught.value.reason is Reason.STORE_FULL
    database.close()


OPEN_AND_ADD = """
import sys
from sqlalchemy import insert
from hueshift.server.clock import SystemClock
from hueshift.server.store.database import Database
from hueshift.server.store.tables import idempotency
file, worker = sys.argv[1:]
database = Database(file, SystemClock())
for n in range(10):
    with database.write() as connection:
        row = {"tenant": "acme", "method": "m", "request_hash": "h", "result": {}, "created": 0.0}
        connection.execute(insert(idempotency).values(key=f"{worker}-{n}", **row))
"""


def test_processes_that_meet_at_an_empty_file_all_get_their_rows_in(tmp_path: Path) -> None:
    file = tmp_path / "h.db"
    command = [sys.executable, "-P", "-c", OPEN_AND_ADD, str(file)]
    processes = [subprocess.Popen([*command, str(worker)]) for worker in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    database = Database(file, SystemClock())
    assert len(keys(database)) == 40
    database.close()


def test_what_is_deleted_is_overwritten(tmp_path: Path) -> None:
    file, secret = tmp_path / "h.db", "a face of somebody" * 1000
    database = Database(file, SystemClock())
    add(database, "old")
    with database.write() as connection:
        connection.execute(update(idempotency).values(result={"secret": secret}))
    with database.write() as connection:
        connection.execute(delete(idempotency))
    database.close()
    assert b"a face of" not in file.read_bytes()
