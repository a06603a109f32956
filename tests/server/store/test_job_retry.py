"""Failed jobs that are queued again: which, what is counted anew, quotas, keys, events; on SQLite and on Postgres."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_clock import FakeClock
from postgres import fresh_database
from small_jobs import SMALL_ADAPTER, small_spec

from hueshift.adapters.errors import AlreadyExists, FailedPrecondition, NotFound, Reason, ResourceExhausted
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_quotas import JobQuotas
from hueshift.server.store.job_records import EventKind, JobRecord, JobState, NewJob
from hueshift.server.store.job_store import JobStore

KEEP = 100.0
SPEC = small_spec()


class Table:
    """A job table on which `alice` has the job ft-1."""

    def __init__(self, where: Path | str, folder: Path) -> None:
        self.clock = FakeClock()
        self.database = Database(where, self.clock)
        quotas = JobQuotas(seconds=1000)
        self.jobs = JobStore(self.database, self.clock, max_attempts=2, quotas=quotas, keep_failed_seconds=KEEP)
        self.adapters = AdapterStore(self.database, BlobStore(folder / "blobs"), self.clock)
        self.add("ft-1")

    def add(self, job_id: str) -> None:
        self.jobs.create(NewJob(job_id, "alice", SPEC, job_id, job_id, {}), tenant_limit=100)

    def fail(self, reason: str = "JOB_TIME_LIMIT") -> JobRecord:
        claimed = self.jobs.claim("worker", 30.0)
        assert claimed is not None
        self.jobs.progress(claimed.lease, 4, 0.5, 0.1)
        self.jobs.checkpoint(claimed.lease, "checkpoint.safetensors")
        self.clock.now += 10
        return self.jobs.fail(claimed.lease, reason, "why")

    def retry(self, key: str = "", limit: int = 100) -> tuple[JobRecord, bool]:
        return self.jobs.retry_failed("alice", "ft-1", tenant_limit=limit, idempotency_key=key)

    def refused(self) -> str:
        with pytest.raises(FailedPrecondition) as caught:
            self.retry()
        assert caught.value.reason is Reason.JOB_NOT_RETRYABLE
        return caught.value.message


@pytest.fixture(params=["sqlite", "postgres"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Table]:
    where: Path | str = tmp_path / "jobs.db"
    if request.param == "postgres":
        where = fresh_database(request.getfixturevalue("postgres_server"), "retry")
    table = Table(where, tmp_path)
    yield table
    table.database.close()


def test_a_job_that_was_given_up_begins_its_attempts_anew(table: Table) -> None:
    for _ in range(2):
        claimed = table.jobs.claim("worker", 30.0)
        assert claimed is not None
        table.jobs.progress(claimed.lease, 4, 0.5, 0.1)
        table.jobs.checkpoint(claimed.lease, "checkpoint.safetensors")
        table.clock.now += 10
        dead = table.jobs.retry(claimed.lease, "incident", 0.0)
    assert (dead.state, dead.error_reason, dead.device_seconds) == (JobState.FAILED, "ATTEMPTS_EXHAUSTED", 20)
    assert table.jobs.can_retry(dead)
    assert (table.jobs.kept_jobs(), table.jobs.open_jobs()) == ({"ft-1"}, set())
    queued, replayed = table.retry()
    assert not replayed
    assert (queued.state, queued.attempt, queued.device_seconds) == (JobState.QUEUED, 0, 0)
    assert (queued.error_reason, queued.error_message, queued.ended) == (None, None, None)
    # Where it stood is kept: the next attempt goes on from the checkpoint. So are the causes, for the operator.
    assert (queued.step, queued.checkpoint, len(queued.failures)) == (4, "checkpoint.safetensors", 2)
    again = table.jobs.claim("worker", 30.0)
    assert again is not None
    assert (again.job.attempt, again.lease.token) == (1, 3)
    table.jobs.publish(again.lease, table.adapters, b"file", SMALL_ADAPTER, None)
    events = table.jobs.events("ft-1")
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    told = [event.payload["state"] for event in events if event.kind is EventKind.STATE]
    assert told == ["queued", "running", "queued", "running", "failed", "queued", "running", "succeeded"]


def test_a_key_queues_a_job_once_however_often_it_is_sent(table: Table) -> None:
    table.fail()
    assert not table.retry("key")[1]
    table.fail()
    # The same call again, not a second wish.
    assert (table.retry("key")[1], table.jobs.get("alice", "ft-1").state) == (True, JobState.FAILED)
    assert not table.retry("another")[1]
    table.add("ft-2")
    with pytest.raises(AlreadyExists):
        table.jobs.retry_failed("alice", "ft-2", tenant_limit=100, idempotency_key="key")


def test_what_cannot_be_retried_says_why(table: Table) -> None:
    assert "it is queued; allowed: failed jobs" in table.refused()
    table.fail("TRAINING_DIVERGED")
    assert "would again" in table.refused()
    assert table.jobs.kept_jobs() == set()
    with pytest.raises(NotFound):
        table.jobs.retry_failed("bob", "ft-1", tenant_limit=100)


def test_after_its_time_a_failed_job_is_gone_for_good(table: Table) -> None:
    failed = table.fail()
    table.clock.now += KEEP - 1
    assert table.jobs.kept_jobs() == {"ft-1"}
    table.clock.now += 1
    assert (table.jobs.kept_jobs(), table.jobs.can_retry(failed)) == (set(), False)
    assert "training.keep_failed_seconds" in table.refused()


def test_the_causes_of_a_job_retried_for_ever_stay_few(table: Table) -> None:
    table.jobs = JobStore(table.database, table.clock, keep_failed_seconds=KEEP)
    for number in range(60):
        claimed = table.jobs.claim("worker", 30.0)
        assert claimed is not None
        failed = table.jobs.fail(claimed.lease, "JOB_MEMORY_LIMIT", f"failure {number}")
        table.retry()
    assert [failed.failures[0]["cause"], failed.failures[-1]["cause"]] == ["failure 10", "failure 59"]


def test_quotas_are_those_of_a_new_job(table: Table) -> None:
    table.fail()
    table.add("ft-2")
    with pytest.raises(ResourceExhausted) as full:
        table.retry(limit=1)
    assert full.value.metadata["quota"] == "tenant_queued_jobs"
    claimed = table.jobs.claim("worker", 3000.0)
    assert claimed is not None
    table.clock.now += 50
    table.jobs.heartbeat(claimed.lease, 30.0)
    assert table.retry(limit=2)[0].state is JobState.QUEUED
