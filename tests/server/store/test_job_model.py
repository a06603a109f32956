"""The job table beside a model of a few lines, on SQLite and on Postgres.

Any order of claims, crashes, zombies, cancellations, publications, of two tenants with quotas.
"""

import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fake_clock import FakeClock
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from postgres import fresh_database
from small_jobs import SMALL_ADAPTER, small_spec
from sqlalchemy import select

from hueshift.adapters.errors import HueshiftError, Reason, ResourceExhausted
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_quotas import JobQuotas
from hueshift.server.store.job_records import EventKind, Lease, NewJob
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.tables import metadata, revisions, schema, usage

SPEC = small_spec()
LEASE_SECONDS = 10.0
MAX_ATTEMPTS = 3
RUNNING_LIMIT = 2
SECONDS_LIMIT = 30.0
KEEP_FAILED = 12.0
DAY = 86400


@dataclass
class ModelJob:
    """What a job should look like."""

    tenant: str
    priority: int
    created: float
    state: str = "queued"
    attempt: int = 0
    token: int = 0
    owner: str = ""
    expires: float = 0.0
    not_before: float = 0.0
    cancel: bool = False
    charged: float = 0.0
    seconds: float = 0.0
    failures: int = 0
    given_up: float | None = None
    published: int = 0
    history: list[str] = field(default_factory=lambda: ["queued"])

    def move(self, state: str) -> None:
        self.state = state
        self.history.append(state)

    def put_back(self, now: float, ended: float) -> None:
        if self.cancel:
            self.move("cancelled")
        elif self.attempt >= MAX_ATTEMPTS:
            self.move("failed")
            self.given_up = ended
        else:
            self.not_before = now
            self.move("queued")


class JobMachine(RuleBasedStateMachine):
    """Every rule does one thing to the table and to the model; the invariants compare them."""

    url = ""

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.clock = FakeClock()
        # A few seconds before midnight, so that days pass.
        self.clock.now = 20_000.0 * DAY - 20
        self.database = Database(self.url or root / "jobs.db", self.clock)
        with self.database.write() as connection:
            for table in reversed(metadata.sorted_tables):
                if table is not schema:
                    connection.execute(table.delete())
        quotas = JobQuotas(running=RUNNING_LIMIT, seconds=SECONDS_LIMIT)
        self.store = JobStore(
            self.database, self.clock, max_attempts=MAX_ATTEMPTS, quotas=quotas, keep_failed_seconds=KEEP_FAILED
        )
        self.used: defaultdict[tuple[str, int], float] = defaultdict(float)
        self.adapters = AdapterStore(self.database, BlobStore(root / "blobs"), self.clock)
        self.model: dict[str, ModelJob] = {}
        self.leases: list[Lease] = []

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
            self.folder.cleanup()

    def today(self, tenant: str) -> float:
        return self.used[tenant, int(self.clock.now // DAY)]

    def charge(self, job: ModelJob) -> None:
        seconds = self.clock.now - job.charged
        job.seconds += seconds
        job.charged = self.clock.now
        self.used[job.tenant, int(self.clock.now // DAY)] += seconds

    @precondition(lambda self: len(self.model) < 6)
    @rule(tenant=st.sampled_from(["alice", "bob"]), priority=st.integers(0, 1))
    def create(self, tenant: str, priority: int) -> None:
        job_id = f"ft-{len(self.model)}"
        new = NewJob(job_id, tenant, SPEC, job_id, job_id, {}, priority)
        if self.today(tenant) >= SECONDS_LIMIT:
            with pytest.raises(ResourceExhausted) as refused:
                self.store.create(new, tenant_limit=100)
            assert refused.value.metadata["quota"] == "tenant_training_seconds"
            assert refused.value.retry_after == DAY - self.clock.now % DAY
            return
        self.store.create(new, tenant_limit=100)
        self.model[job_id] = ModelJob(tenant, priority, self.clock.now)

    @rule(owner=st.sampled_from(["one", "two"]))
    def claim(self, owner: str) -> None:
        heads: dict[str, tuple[int, float, str]] = {}
        for job_id, job in self.model.items():
            if job.state == "queued" and job.not_before <= self.clock.now:
                place = (-job.priority, job.created, job_id)
                heads[job.tenant] = min(heads.get(job.tenant, place), place)
        waiting = []
        for tenant, (_, created, job_id) in heads.items():
            running = sum(job.tenant == tenant and job.state == "running" for job in self.model.values())
            if running < RUNNING_LIMIT and self.today(tenant) < SECONDS_LIMIT:
                waiting.append((running, self.today(tenant), created, job_id))
        claimed = self.store.claim(owner, LEASE_SECONDS)
        assert (claimed.job.job_id if claimed else None) == (min(waiting)[-1] if waiting else None)
        if claimed is None:
            return
        job = self.model[claimed.job.job_id]
        job.attempt, job.token, job.owner = job.attempt + 1, job.token + 1, owner
        job.expires = self.clock.now + LEASE_SECONDS
        job.charged = self.clock.now
        job.move("running")
        assert claimed.lease == Lease(claimed.job.job_id, job.token)
        self.leases.append(claimed.lease)

    @precondition(lambda self: self.leases)
    @rule(
        pick=st.integers(0, 100),
        action=st.sampled_from(["heartbeat", "publish", "publish", "release", "retry", "fail", "progress", "stop"]),
    )
    def act(self, pick: int, action: str) -> None:
        """Any holder there ever was, zombies too, does any of the things a holder does."""
        lease = self.leases[-1 - pick % len(self.leases)]
        job = self.model[lease.job_id]
        held = job.state == "running" and job.token == lease.token
        expected = None if held else Reason.LEASE_LOST
        if held and job.cancel and action == "publish":
            expected = Reason.CANCELLED
        assert self.refusal(action, lease) is expected
        if expected is None:
            self.apply(action, job)

    def refusal(self, action: str, lease: Lease) -> Reason | None:
        try:
            self.do(action, lease)
        except HueshiftError as error:
            return error.reason
        return None

    def do(self, action: str, lease: Lease) -> None:
        if action == "heartbeat":
            assert self.store.heartbeat(lease, LEASE_SECONDS).cancel_requested == self.model[lease.job_id].cancel
        elif action == "publish":
            self.store.publish(lease, self.adapters, lease.job_id.encode(), SMALL_ADAPTER, None)
        elif action == "release":
            self.store.release(lease)
        elif action == "retry":
            self.store.retry(lease, "incident", 5.0)
        elif action == "fail":
            self.store.fail(lease, "TRAINING_DIVERGED", "diverged")
        elif action == "progress":
            self.store.progress(lease, 1, 0.5, 0.1)
        else:
            self.store.stop_cancelled(lease)

    def apply(self, action: str, job: ModelJob) -> None:
        if action != "progress":
            self.charge(job)
        if action in ("retry", "fail"):
            job.failures += 1
        if action == "heartbeat":
            job.expires = self.clock.now + LEASE_SECONDS
        elif action == "publish":
            job.published += 1
            job.move("succeeded")
        elif action == "release" and not job.cancel:
            job.attempt -= 1
            job.not_before = self.clock.now
            job.move("queued")
        elif action == "retry":
            job.put_back(self.clock.now + 5.0, self.clock.now)
        elif action == "fail":
            job.move("failed")
        elif action in ("stop", "release"):
            job.move("cancelled")

    @precondition(lambda self: self.model)
    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        job_id = sorted(self.model)[pick % len(self.model)]
        job = self.model[job_id]
        self.store.cancel(job.tenant, job_id)
        if job.state == "queued":
            job.move("cancelled")
        elif job.state == "running":
            job.cancel = True

    @precondition(lambda self: self.model)
    @rule(pick=st.integers(0, 100))
    def retry_failed(self, pick: int) -> None:
        """Only what was given up a short time ago goes back, and quotas hold as for a new job."""
        given_up = sorted(job_id for job_id, job in self.model.items() if job.given_up is not None)
        job_id = (given_up or sorted(self.model))[pick % len(given_up or self.model)]
        job = self.model[job_id]
        expected = None
        if job.given_up is None or self.clock.now - job.given_up >= KEEP_FAILED:
            expected = Reason.JOB_NOT_RETRYABLE
        elif self.today(job.tenant) >= SECONDS_LIMIT:
            expected = Reason.TENANT_QUOTA
        if expected is not None:
            with pytest.raises(HueshiftError) as refused:
                self.store.retry_failed(job.tenant, job_id, tenant_limit=100)
            assert refused.value.reason is expected
            return
        self.store.retry_failed(job.tenant, job_id, tenant_limit=100)
        job.attempt, job.seconds, job.not_before, job.cancel, job.given_up = 0, 0.0, 0.0, False, None
        job.move("queued")

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(owner=st.sampled_from([None, None, "one"]))
    def expire(self, owner: str | None) -> None:
        lost = {
            job_id
            for job_id, job in self.model.items()
            if job.state == "running" and (job.expires < self.clock.now if owner is None else job.owner == owner)
        }
        assert {job.job_id for job in self.store.expire_leases(owner)} == lost
        for job_id in lost:
            # What lies after the last heartbeat is not charged: nobody knows how long the worker lived.
            self.model[job_id].failures += 1
            self.model[job_id].put_back(self.clock.now, self.clock.now)

    @invariant()
    def agrees(self) -> None:
        for job_id, job in getattr(self, "model", {}).items():
            stored = self.store.get(job.tenant, job_id)
            assert (stored.state, stored.attempt, stored.fencing_token) == (job.state, job.attempt, job.token)
            assert (stored.ended is not None) == (job.state in ("succeeded", "failed", "cancelled"))
            events = self.store.events(job_id, limit=1000)
            assert [event.sequence for event in events] == list(range(1, stored.sequence + 1))
            assert [e.payload["state"] for e in events if e.kind is EventKind.STATE] == job.history
            assert (stored.device_seconds, len(stored.failures)) == (job.seconds, job.failures)
            assert job.published == (job.state == "succeeded")
            with self.database.read() as connection:
                found = connection.execute(select(revisions.c.revision).where(revisions.c.job_id == job_id)).all()
            assert len(found) == job.published

    @invariant()
    def counts_the_seconds(self) -> None:
        if hasattr(self, "used"):
            with self.database.read() as connection:
                found = {(r.tenant, r.day): r.device_seconds for r in connection.execute(usage.select())}
            assert {key: value for key, value in found.items() if value} == {k: v for k, v in self.used.items() if v}


def run(url: str, examples: int, steps: int) -> None:
    limits = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )

    class Placed(JobMachine):
        pass

    Placed.url = url
    run_state_machine_as_test(Placed, settings=limits)


def test_the_table_on_sqlite() -> None:
    run("", 40, 40)


def test_the_table_on_postgres(postgres_server: str) -> None:
    run(fresh_database(postgres_server, "model"), 20, 30)
