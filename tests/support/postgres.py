"""A Postgres of the tests' own, on loopback, in a temporary folder, without durability."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

# Debian keeps the programs of each version in a folder of its own, off the path.
_DEBIAN = Path("/usr/lib/postgresql")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _programs() -> tuple[str, str]:
    folders = [str(folder) for folder in sorted(_DEBIAN.glob("*/bin"), reverse=True)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    initdb, pg_ctl = shutil.which("initdb", path=path), shutil.which("pg_ctl", path=path)
    if initdb is None or pg_ctl is None:
        pytest.skip("initdb and pg_ctl of Postgres are not installed (Debian package: postgresql)")
    return initdb, pg_ctl


@contextmanager
def run_postgres() -> Iterator[str]:
    """Run a server and give its URL, without the name of a database. Skips the test where that is not possible."""
    pytest.importorskip("psycopg", reason="psycopg, the driver of Postgres, is not installed")
    initdb, pg_ctl = _programs()
    # Postgres refuses to run as root.
    user = None
    if os.geteuid() == 0:
        if "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
            pytest.skip("Postgres does not run as root, and there is no user postgres")
        user = "postgres"
    with tempfile.TemporaryDirectory() as folder:
        if user is not None:
            shutil.chown(folder, user)
        data, port = f"{folder}/data", free_port()
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        for command in (
            [initdb, "-D", data, "-U", "hueshift", "--auth=trust", "-N"],
            [pg_ctl, "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start"],
        ):
            subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        try:
            yield f"postgresql+psycopg://hueshift@127.0.0.1:{port}"
        finally:
            stop = [pg_ctl, "-D", data, "-m", "immediate", "stop"]
            subprocess.run(stop, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def fresh_database(server: str, name: str) -> str:
    """Make an empty database, in place of one of that name, and return its URL."""
    engine = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"
