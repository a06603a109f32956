"""Replicas announce themselves, renew, replace what stood at their address, and withdraw."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_clock import FakeClock

from hueshift.server.cluster.announcing import advertised, keep_announced
from hueshift.server.settings import load_settings
from hueshift.server.store.database import Database
from hueshift.server.store.replicas import ReplicaRecord, ReplicaStore

A, B = ReplicaRecord("a", "host:1"), ReplicaRecord("b", "host:2")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def table(tmp_path: Path, clock: FakeClock) -> Iterator[ReplicaStore]:
    database = Database(tmp_path / "h.db", clock)
    yield ReplicaStore(database)
    database.close()


def test_a_row_lives_as_long_as_it_is_renewed(table: ReplicaStore, clock: FakeClock) -> None:
    table.announce(A, 6.0)
    table.announce(B, 6.0)
    clock.now += 5
    table.announce(B, 6.0)
    clock.now += 5
    assert table.read() == ([B], {"a"})
    # A restart at the same address stands for its predecessor.
    table.announce(ReplicaRecord("a2", A.address), 6.0)
    assert table.read() == ([ReplicaRecord("a2", A.address), B], set())
    table.withdraw("b")
    assert table.read() == ([ReplicaRecord("a2", A.address)], set())


async def test_announced_until_cancelled(table: ReplicaStore) -> None:
    task = asyncio.create_task(keep_announced(table, "host:1", 0.01))
    async with asyncio.timeout(5):
        while not table.read()[0]:  # noqa: ASYNC110 (the condition is in the database)
            await asyncio.sleep(0.01)
    assert table.read()[0][0].address == "host:1"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert table.read() == ([], set())


@pytest.mark.parametrize(
    ("host", "advertise", "told"),
    [
        ("127.0.0.1", "", "127.0.0.1:4001"),
        ("0.0.0.0", "10.1.2.3:50051", "10.1.2.3:50051"),
        ("0.0.0.0", "10.1.2.3:0", "10.1.2.3:4001"),
        ("0.0.0.0", "", "node-7:4001"),
    ],
)
def test_the_address_told(host: str, advertise: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    settings = load_settings(None, server={"host": host}, cluster={"advertise": advertise})
    assert advertised(settings, f"{host}:4001") == told
