"""Hosts whose clocks differ agree on when a lease ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fake_clock import FakeClock
from postgres import fresh_database
from small_jobs import small_spec
from sqlalchemy import Connection

from hueshift.server.clock import SystemClock
from hueshift.server.settings import Settings, StoreSettings
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.replicas import ReplicaRecord, ReplicaStore
from hueshift.server.store.shared_clock import SharedClock
from hueshift.server.store.stores import Stores, open_stores


class SkewedClock(SystemClock):
    """A host's clock that is wrong by so many seconds."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead

    def time(self) -> float:
        return super().time() + self.ahead


class Server:
    """Tells a time, after a while."""

    def __init__(self, clock: FakeClock, epoch: float) -> None:
        self.clock, self.epoch, self.takes, self.asked = clock, epoch, 0.0, 0

    def scalar(self, _query: Any) -> float:
        self.asked += 1
        self.clock.advance(self.takes)
        return self.epoch + self.clock.now - self.takes / 2


def test_time_is_the_servers_and_asked_for_now_and_then() -> None:
    clock = FakeClock()
    shared, server = SharedClock(clock), Server(clock, 5e8)
    connection = cast(Connection, server)
    assert shared.time() == clock.now
    # The first answer counts, however slow.
    server.takes = 4.0
    shared.follow(connection)
    assert shared.time() == 5e8 + clock.now
    clock.advance(29.0)
    shared.follow(connection)
    assert server.asked == 1
    # A slow one later does not, and the next transaction asks again.
    server.epoch, server.takes = 5e8 + 1.0, 2.0
    clock.advance(2.0)
    shared.follow(connection)
    assert shared.time() == 5e8 + clock.now
    server.takes = 0.0
    shared.follow(connection)
    assert (shared.time(), server.asked) == (5e8 + 1.0 + clock.now, 3)


@pytest.fixture
def hosts(postgres_server: str, tmp_path: Path) -> Iterator[list[Stores]]:
    """Stores of three hosts on one Postgres: the second an hour ahead, the third an hour behind."""
    url = fresh_database(postgres_server, "clocks")
    settings = Settings(store=StoreSettings.model_validate({"path": tmp_path, "database_url": url}))
    found = [open_stores(settings, SkewedClock(ahead)) for ahead in (0.0, 3600.0, -3600.0)]
    yield found
    for stores in found:
        stores.close()


def test_nobody_takes_a_job_before_its_lease_has_ended(hosts: list[Stores]) -> None:
    right, ahead, behind = hosts
    for index, host in enumerate(hosts):
        host.jobs.create(NewJob(f"ft-{index}", f"t{index}", small_spec(), "fox", "Fox", {}), tenant_limit=9)
        claimed = host.jobs.claim(f"worker-{index}", 30.0)
        assert claimed is not None
        assert host.jobs.heartbeat(claimed.lease, 30.0).device_seconds < 10
    assert [host.jobs.expire_leases() for host in hosts] == [[], [], []]
    assert right.jobs.numbers().states[JobState.RUNNING] == 3
    # And everybody sees that one has ended.
    right.jobs.create(NewJob("ft-late", "late", small_spec(), "fox", "Fox", {}), tenant_limit=9)
    assert behind.jobs.claim("silent", -1.0) is not None
    assert [job.job_id for job in ahead.jobs.expire_leases()] == ["ft-late"]


def test_replicas_of_any_host_are_alive_to_all(hosts: list[Stores]) -> None:
    stores = [ReplicaStore(host.database) for host in hosts]
    for index, store in enumerate(stores):
        store.announce(ReplicaRecord(f"replica-{index}", f"10.0.0.{index}:50051"), 6.0)
    for store in stores:
        live, silent = store.read()
        assert [replica.replica_id for replica in live] == ["replica-0", "replica-1", "replica-2"]
        assert silent == set()
