"""Quotas of tenants and the causes of failures, beyond what the model compares."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_clock import FakeClock
from postgres import fresh_database
from small_jobs import small_spec

from hueshift.adapters.errors import Reason, ResourceExhausted
from hueshift.server.rpc.status import to_status
from hueshift.server.store.database import Database
from hueshift.server.store.job_quotas import JobQuotas, forget_usage
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.job_store import JobStore

SPEC = small_spec()
NOON = 20_000 * 86400.0 + 43200


def add(jobs: JobStore, job_id: str, tenant: str = "alice") -> None:
    jobs.create(NewJob(job_id, tenant, SPEC, job_id, job_id, {}), tenant_limit=100)


@pytest.fixture
def clock() -> FakeClock:
    clock = FakeClock()
    clock.now = NOON
    return clock


@pytest.fixture
def database(tmp_path: Path, clock: FakeClock) -> Iterator[Database]:
    database = Database(tmp_path / "h.db", clock)
    yield database
    database.close()


def test_a_used_up_day_is_refused_until_midnight(database: Database, clock: FakeClock) -> None:
    jobs = JobStore(database, clock, quotas=JobQuotas(seconds=100))
    add(jobs, "ft-1")
    add(jobs, "ft-2")
    claimed = jobs.claim("worker", 30.0)
    assert claimed is not None
    clock.now += 100
    # A job that runs goes on: it is the next one that must wait.
    assert jobs.heartbeat(claimed.lease, 30.0).device_seconds == 100
    jobs.release(claimed.lease)
    assert jobs.claim("worker", 30.0) is None
    with pytest.raises(ResourceExhausted) as refused:
        add(jobs, "ft-3")
    error = refused.value
    assert (error.reason, error.metadata["quota"]) == (Reason.TENANT_QUOTA, "tenant_training_seconds")
    assert (error.metadata["used"], error.metadata["limit"]) == ("100", "100")
    assert error.retry_after == 43100
    kinds = {detail.type_url.rpartition(".")[2] for detail in to_status(error).proto.details}
    assert kinds == {"ErrorInfo", "RetryInfo", "QuotaFailure"}
    add(jobs, "b-1", "bob")
    other = jobs.claim("worker", 30.0)
    assert other is not None
    assert other.job.tenant == "bob"
    clock.now += error.retry_after
    assert jobs.claim("worker", 30.0) is not None


def test_claims_at_once_keep_a_tenants_limit_on_postgres(postgres_server: str, clock: FakeClock) -> None:
    url = fresh_database(postgres_server, "quotas")
    hosts = [Database(url, clock) for _ in range(4)]
    stores = [JobStore(host, clock, quotas=JobQuotas(running=2)) for host in hosts]
    for number in range(8):
        add(stores[0], f"ft-{number}")
    taken: list[str] = []
    start = threading.Barrier(4)

    def take(store: JobStore) -> None:
        start.wait()
        for _ in range(4):
            claimed = store.claim("worker", 30.0)
            if claimed is not None:
                taken.append(claimed.job.job_id)

    threads = [threading.Thread(target=take, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ["ft-0", "ft-1"]
    for host in hosts:
        host.close()


def test_what_ended_each_attempt_is_kept(database: Database, clock: FakeClock) -> None:
    jobs = JobStore(database, clock, max_attempts=3)
    add(jobs, "ft-1")
    first = jobs.claim("one", 30.0)
    assert first is not None
    jobs.expire_leases("one", "its process ended with signal 9")
    second = jobs.claim("two", 30.0)
    assert second is not None
    jobs.retry(second.lease, "an internal error (incident 1)", 0.0, cause="OSError: no space")
    third = jobs.claim("three", 30.0)
    assert third is not None
    clock.now += 31
    (dead,) = jobs.expire_leases()
    assert (dead.state, dead.error_reason) == (JobState.FAILED, "ATTEMPTS_EXHAUSTED")
    assert jobs.dead_letters() == [dead]
    assert [(f["attempt"], f["owner"], f["cause"]) for f in dead.failures] == [
        (1, "one", "its process ended with signal 9"),
        (2, "two", "OSError: no space"),
        (3, "three", "its worker went silent"),
    ]
    # The tenant is told that it was given up, not the machine's troubles.
    assert "OSError" not in str(dead.error_message)


def test_the_counts_of_long_ago_are_forgotten(database: Database, clock: FakeClock) -> None:
    jobs = JobStore(database, clock)
    for day in range(3):
        add(jobs, f"ft-{day}")
        claimed = jobs.claim("worker", 30.0)
        assert claimed is not None
        clock.now += 10
        jobs.fail(claimed.lease, "X", "x")
        clock.now += 86390
    with database.write() as connection:
        # The day that is asked about is kept.
        assert forget_usage(connection, NOON + 86400) == 1
        assert forget_usage(connection, NOON + 86400) == 0
