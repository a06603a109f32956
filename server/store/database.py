"""One database for all that must outlive a crash: SQLite in a file by default, Postgres when several hosts share.

SQLite runs in WAL mode with synchronous=FULL: with NORMAL the last commits may be lost at a power cut. Writes begin
with BEGIN IMMEDIATE, because a transaction that reads first and upgrades later fails at once when another has written
in between, whatever the busy timeout. WAL needs a local disk, not a network share.
"""

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from hueshift.adapters.errors import (
    FailedPrecondition,
    HueshiftError,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from hueshift.server.clock import Clock
from hueshift.server.store import tables
from hueshift.server.store.migrations import can_migrate, migrate
from hueshift.server.store.shared_clock import SharedClock

_BUSY_SECONDS = 20.0
# Longer than an adapter file takes to reach an object store, which happens inside the transaction that publishes it.
_IDLE_SECONDS = 300
# Every thread of the event loop's pool (serve.THREADS), of `file_threads` and a few more may hold one at once.
_POOL_SIZE = 8
_POOL_OVERFLOW = 32
_WRITE_OPTION = "hueshift_write"
# Names that one query asks for: any database takes as many.
_ASKED_AT_ONCE = 500
_CLOCK_OPTION = "hueshift_clock"
_BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
# Postgres: serialization failure, deadlock, lock timeout, idle too long, too many connections, out of memory, statement
# timeout, shutting down, crashed, starting, and read-only, which is the old server or a standby during a failover.
_RETRY_STATES = frozenset(
    {"40001", "40P01", "55P03", "25P03", "53300", "53200", "57014", "57P01", "57P02", "57P03", "25006"}
)
_DISK_FULL_STATE = "53100"


class Database:
    """Connections to the tables of `hueshift.server.store.tables`. Safe to share between threads, not across a fork.

    `clock` gives the times of every record; the stores built on this database use it.
    """

    def __init__(self, location: str | Path, clock: Clock) -> None:
        """Open the database file or URL at `location`; create its tables if it is empty, bring older ones up to date.

        Raises InvalidArgument (SETTINGS_INVALID) on an unusable URL, FailedPrecondition (STORE_SCHEMA) on the tables of
        another version or a file that is no database.
        """
        self.clock = clock
        self._engine = _open(location).execution_options(**{_CLOCK_OPTION: clock})
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._writer = self._engine.execution_options(**{_WRITE_OPTION: True})
        # SQLite has one writer. Waiting here is fair and wakes at once; its busy handler polls.
        self._write_turn = threading.Lock()
        try:
            self._prepare(str(location) if self._is_sqlite else self._engine.url.render_as_string())
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Give a connection that sees one moment of the database (SQLite) or committed rows (Postgres).

        Raises Unavailable (STORE_UNAVAILABLE) when the database does not answer.
        """
        with _translated(), self._engine.begin() as connection:
            # SQLite's writers are all on one host.
            if isinstance(self.clock, SharedClock) and not self._is_sqlite:
                self.clock.follow(connection)
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Give a connection in a writing transaction: committed at the end of the block, rolled back on any exception.

        Not reentrant. Raises Unavailable (STORE_UNAVAILABLE) when no turn comes within 20 seconds, ResourceExhausted
        (STORE_FULL) when the disk is full.
        """
        if not self._is_sqlite:
            with self.read() as connection:
                yield connection
            return
        if not self._write_turn.acquire(timeout=_BUSY_SECONDS):
            raise _unavailable("its writers kept it busy")
        try:
            with _translated(), self._writer.begin() as connection:
                yield connection
        finally:
            self._write_turn.release()

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()

    def _prepare(self, shown: str) -> None:
        try:
            if self._is_sqlite:
                self._use_wal()
            with self.write() as connection:
                lock(connection, "schema")
                _create_or_check(connection, shown)
        except (DBAPIError, sqlite3.DatabaseError) as error:
            if _sqlite_code(error) != sqlite3.SQLITE_NOTADB:
                raise
            raise FailedPrecondition(
                Reason.STORE_SCHEMA, f"{shown} is not a SQLite database. Give another store folder."
            ) from error

    def _use_wal(self) -> None:
        # Switching needs the file alone, and SQLite does not wait for that: when two processes meet here, try again.
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            connection = self._engine.raw_connection()
            try:
                mode = connection.cursor().execute("PRAGMA journal_mode=WAL").fetchone()[0]
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode not in _BUSY_CODES or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
                continue
            finally:
                connection.close()
            if mode != "wal":
                raise FailedPrecondition(
                    Reason.STORE_SCHEMA, f"SQLite offers journal mode {mode} here; the store needs WAL on a local disk"
                )
            return


def lock(connection: Connection, name: str) -> None:
    """Hold the lock of that name until the transaction ends.

    On Postgres an advisory lock; on SQLite a writing transaction is alone already.
    """
    if connection.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def now(connection: Connection) -> float:
    """Return the time of the database's clock, in seconds since the epoch."""
    clock: Clock = connection.get_execution_options()[_CLOCK_OPTION]
    return clock.time()


def _open(location: str | Path) -> Engine:
    try:
        if isinstance(location, str) and "://" in location:
            url = make_url(location)
        else:
            file = Path(location).expanduser().resolve()
            # The folder holds what users taught and the hashes of their keys.
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            url = make_url("sqlite://").set(database=str(file))
        if url.get_backend_name() not in ("sqlite", "postgresql") or (
            url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")
        ):
            raise InvalidArgument.for_field(
                "store.database_url",
                f"{url.render_as_string()} given; allowed: a SQLite file or a postgresql:// URL",
                Reason.SETTINGS_INVALID,
            )
        options = {"pool_size": _POOL_SIZE, "max_overflow": _POOL_OVERFLOW, "pool_timeout": _BUSY_SECONDS}
        if url.get_backend_name() == "postgresql":
            return create_engine(url, pool_pre_ping=True, connect_args=_postgres_arguments(url), **options)
        engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False}, **options)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InvalidArgument.for_field(
            "store.database_url", f"cannot be opened: {error}", Reason.SETTINGS_INVALID
        ) from error
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _postgres_arguments(url: URL) -> dict[str, Any]:
    """Return what keeps a silent server, or a client that died with a lock, from holding us up. The URL's own wins."""
    if not url.get_driver_name().startswith("psycopg"):
        return {}
    waits = f"-c lock_timeout={_BUSY_SECONDS * 1000:.0f} -c idle_in_transaction_session_timeout={_IDLE_SECONDS * 1000}"
    # A host that dies while it owes an answer leaves nothing unacknowledged: only probes find that out, and the system
    # sends none for two hours.
    probes = {"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3}
    ours = {"connect_timeout": 10, "tcp_user_timeout": int(_BUSY_SECONDS * 1000), "options": waits, **probes}
    return {name: value for name, value in ours.items() if name not in url.query}


def _on_connect(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
    # The driver would otherwise send BEGIN by its own rules, and none before a SELECT.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    # What a person has had deleted is overwritten, not only left out: free pages would keep sample pictures for months.
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITE_OPTION, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _create_or_check(connection: Connection, shown: str) -> None:
    present = set(inspect(connection).get_table_names())
    ours = present & set(tables.metadata.tables)
    if not ours:
        tables.metadata.create_all(connection)
        connection.execute(insert(tables.schema).values(version=tables.SCHEMA_VERSION))
        return
    versions = list(connection.execute(select(tables.schema.c.version)).scalars()) if "schema" in ours else []
    if len(versions) == 1 and can_migrate(versions[0]):
        migrate(connection, versions[0])
    elif versions != [tables.SCHEMA_VERSION]:
        found = ", ".join(map(str, versions)) or "none"
        raise FailedPrecondition(
            Reason.STORE_SCHEMA,
            f"{shown} holds schema version {found}; this server reads version {tables.SCHEMA_VERSION}. "
            "Start the server version that wrote it, or give another store folder.",
        )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise _unavailable("all connections are in use") from error
    except DBAPIError as error:
        known = _known(error)
        if known is None:
            raise
        raise known from error


def _known(error: DBAPIError) -> HueshiftError | None:
    code, state = _sqlite_code(error), getattr(error.orig, "sqlstate", None)
    if code is not None and code & 0xFF in _BUSY_CODES:
        return _unavailable("its writers kept it busy")
    if code == sqlite3.SQLITE_FULL or state == _DISK_FULL_STATE:
        return ResourceExhausted(Reason.STORE_FULL, "the disk of the store is full; free space and try again")
    # A Postgres server that cannot be reached gives neither a code nor a state.
    unreachable = isinstance(error, OperationalError) and code is None and state is None
    if error.connection_invalidated or state in _RETRY_STATES or unreachable:
        return _unavailable("there is no connection")
    return None


def _sqlite_code(error: DBAPIError | sqlite3.DatabaseError) -> int | None:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return getattr(cause, "sqlite_errorcode", None)


def _unavailable(cause: str) -> Unavailable:
    return Unavailable(
        Reason.STORE_UNAVAILABLE, f"the database did not answer in time: {cause}; try again", retry_after=1.0
    )


def in_batches(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Yield the names as many at a time as one query may ask for."""
    left = iter(names)
    while some := tuple(islice(left, _ASKED_AT_ONCE)):
        yield some
