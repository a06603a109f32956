"""The job table beside a model of a few lines: any order of claims, crashes, zombies, cancellations, publications."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fake_clock import FakeClock
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_jobs import SMALL_ADAPTER, small_spec
from sqlalchemy import select

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_records import EventKind, Lease, NewJob
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.tables import revisions

SPEC = small_spec()
LEASE_SECONDS = 10.0
MAX_ATTEMPTS = 3


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
    published: int = 0
    history: list[str] = field(default_factory=lambda: ["queued"])

    def move(self, state: str) -> None:
        self.state = state
        self.history.append(state)

    def put_back(self, now: float) -> None:
        if self.cancel:
            self.move("cancelled")
        elif self.attempt >= MAX_ATTEMPTS:
            self.move("failed")
        else:
            self.not_before = now
            self.move("queued")


class JobMachine(RuleBasedStateMachine):
    """Every rule does one thing to the table and to the model; the invariants compare them."""

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.clock = FakeClock()
        self.database = Database(root / "jobs.db", self.clock)
        self.store = JobStore(self.database, self.clock, max_attempts=MAX_ATTEMPTS)
        self.adapters = AdapterStore(self.database, BlobStore(root / "blobs"), self.clock)
        self.model: dict[str, ModelJob] = {}
        self.leases: list[Lease] = []

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
            self.folder.cleanup()

    @precondition(lambda self: len(self.model) < 6)
    @rule(tenant=st.sampled_from(["alice", "bob"]), priority=st.integers(0, 1))
    def create(self, tenant: str, priority: int) -> None:
        job_id = f"ft-{len(self.model)}"
        self.store.create(NewJob(job_id, tenant, SPEC, job_id, job_id, {}, priority), tenant_limit=100)
        self.model[job_id] = ModelJob(tenant, priority, self.clock.now)

    @rule(owner=st.sampled_from(["one", "two"]))
    def claim(self, owner: str) -> None:
        def running(tenant: str) -> int:
            return sum(job.tenant == tenant and job.state == "running" for job in self.model.values())

        waiting = [
            (-job.priority, running(job.tenant), job.created, job_id)
            for job_id, job in self.model.items()
            if job.state == "queued" and job.not_before <= self.clock.now
        ]
        claimed = self.store.claim(owner, LEASE_SECONDS)
        assert (claimed.job.job_id if claimed else None) == (min(waiting)[-1] if waiting else None)
        if claimed is None:
            return
        job = self.model[claimed.job.job_id]
        job.attempt, job.token, job.owner = job.attempt + 1, job.token + 1, owner
        job.expires = self.clock.now + LEASE_SECONDS
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
            assert self.store.heartbeat(lease, LEASE_SECONDS) == self.model[lease.job_id].cancel
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
        if action == "heartbeat":
            job.expires = self.clock.now + LEASE_SECONDS
        elif action == "publish":
            job.published += 1
            job.move("succeeded")
        elif action == "release" and not job.cancel:
            job.attempt -= 1
            job.move("queued")
        elif action == "retry":
            job.put_back(self.clock.now + 5.0)
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
            self.model[job_id].put_back(self.clock.now)

    @invariant()
    def agrees(self) -> None:
        for job_id, job in getattr(self, "model", {}).items():
            stored = self.store.get(job.tenant, job_id)
            assert (stored.state, stored.attempt, stored.fencing_token) == (job.state, job.attempt, job.token)
            assert (stored.ended is not None) == (job.state in ("succeeded", "failed", "cancelled"))
            events = self.store.events(job_id, limit=1000)
            assert [event.sequence for event in events] == list(range(1, stored.sequence + 1))
            assert [e.payload["state"] for e in events if e.kind is EventKind.STATE] == job.history
            assert job.published == (job.state == "succeeded")
            with self.database.read() as connection:
                found = connection.execute(select(revisions.c.revision).where(revisions.c.job_id == job_id)).all()
            assert len(found) == job.published


TestJobs = JobMachine.TestCase
TestJobs.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
