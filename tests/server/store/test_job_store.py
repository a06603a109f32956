"""The job table: order of claims, leases, fencing, exactly-once publishing, events without gaps."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_clock import FakeClock
from small_jobs import SMALL_ADAPTER, small_spec
from sqlalchemy import Connection, select

from hueshift.adapters.errors import AlreadyExists, Cancelled, HueshiftError, NotFound, Reason, ResourceExhausted
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_events import KEPT_SAMPLES, READ_BYTES
from hueshift.server.store.job_records import ClaimedJob, EventKind, JobState, Lease, NewJob
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.tables import revisions

SPEC = small_spec()


class House:
    """The stores on one small database."""

    def __init__(self, folder: Path, max_attempts: int = 3) -> None:
        self.clock = FakeClock()
        self.database = Database(folder / "jobs.db", self.clock)
        self.jobs = JobStore(self.database, self.clock, max_attempts=max_attempts)
        self.adapters = AdapterStore(self.database, BlobStore(folder / "blobs"), self.clock)

    def create(self, job_id: str, tenant: str = "alice", priority: int = 0, limit: int = 100) -> None:
        adapter_id = f"for-{job_id}"
        new = NewJob(job_id, tenant, SPEC, adapter_id, adapter_id, {}, priority)
        self.jobs.create(new, tenant_limit=limit)
        self.clock.now += 1

    def claim(self, owner: str = "worker") -> ClaimedJob:
        claimed = self.jobs.claim(owner, 30.0)
        assert claimed is not None
        return claimed

    def publish(self, lease: Lease) -> int:
        return self.jobs.publish(lease, self.adapters, lease.job_id.encode(), SMALL_ADAPTER, {"clip_i": 0.5}).revision

    def states(self, job_id: str) -> list[str]:
        events = self.jobs.events(job_id, limit=1000)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return [event.payload["state"] for event in events if event.kind is EventKind.STATE]

    def revisions_of(self, job_id: str) -> int:
        with self.database.read() as connection:
            return len(connection.execute(select(revisions).where(revisions.c.job_id == job_id)).all())


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.database.close()


def lost(call: Any, *arguments: Any) -> bool:
    """Whether the call was refused with LEASE_LOST."""
    try:
        call(*arguments)
    except HueshiftError as error:
        return error.reason is Reason.LEASE_LOST
    return False


def test_a_job_goes_from_queue_to_adapter(house: House) -> None:
    house.create("ft-1")
    claimed = house.claim()
    assert (claimed.job.state, claimed.job.attempt, claimed.job.lease_owner) == (JobState.RUNNING, 1, "worker")
    house.jobs.progress(claimed.lease, 5, 0.25, 0.1)
    house.jobs.sample(claimed.lease, 5, "a prompt", b"png")
    house.jobs.checkpoint(claimed.lease, "checkpoint")
    assert house.publish(claimed.lease) == 1
    job = house.jobs.get("alice", "ft-1")
    assert (job.state, job.step, job.revision, job.scores) == (JobState.SUCCEEDED, 10, 1, {"clip_i": 0.5})
    assert job.lease_owner is None
    assert house.adapters.get("alice", "for-ft-1").revision == 1
    assert house.states("ft-1") == ["queued", "running", "succeeded"]
    progress, sample = house.jobs.events("ft-1")[2:4]
    assert progress.payload == {"step": 5, "steps": 10, "loss": 0.25, "seconds_per_step": 0.1}
    assert (sample.payload, sample.data) == ({"step": 5, "prompt": "a prompt"}, b"png")
    assert house.jobs.events("ft-1", after=4)[0].sequence == 5


def test_claims_are_fair_between_tenants_and_by_priority_within_one(house: House) -> None:
    for number in range(3):
        house.create(f"a-{number}", "alice")
    house.create("a-urgent", "alice", priority=1)
    house.create("b-0", "bob")
    house.create("c-0", "carol", priority=1)
    order = [house.claim().job.job_id for _ in range(6)]
    # Alice came first, with her urgent one; then those who run nothing, oldest first, whatever they call urgent.
    assert order == ["a-urgent", "b-0", "c-0", "a-0", "a-1", "a-2"]
    assert house.jobs.claim("worker", 30.0) is None


def test_a_claim_that_waited_for_other_writers_has_its_whole_lease(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.create("one")
    write = house.database.write

    @contextmanager
    def write_late() -> Iterator[Connection]:
        house.clock.now += 40.0
        with write() as connection:
            yield connection

    with monkeypatch.context() as busy:
        busy.setattr(house.database, "write", write_late)
        claimed = house.claim()
    assert claimed.job.lease_expires == house.clock.now + 30.0
    assert house.jobs.expire_leases() == []
    # Nor does the tenant pay for the waiting.
    house.clock.now += 1.0
    assert house.jobs.heartbeat(claimed.lease, 30.0).device_seconds == 1.0


def test_a_lost_lease_returns_the_job_and_disarms_the_old_holder(house: House) -> None:
    house.create("ft-1")
    zombie = house.claim("first")
    house.clock.now += 29
    assert house.jobs.heartbeat(zombie.lease, 30.0).cancel_requested is False
    house.clock.now += 29
    assert house.jobs.expire_leases() == []
    house.clock.now += 2
    (back,) = house.jobs.expire_leases()
    assert (back.state, back.attempt, back.leases_lost) == (JobState.QUEUED, 1, 1)
    second = house.claim("second")
    assert second.lease.token > zombie.lease.token
    assert lost(house.jobs.heartbeat, zombie.lease, 30.0)
    assert lost(house.jobs.progress, zombie.lease, 1, 0.1, 0.1)
    assert lost(house.jobs.sample, zombie.lease, 1, "", b"")
    assert lost(house.jobs.checkpoint, zombie.lease, "")
    assert lost(house.jobs.fail, zombie.lease, "X", "x")
    assert lost(house.jobs.retry, zombie.lease, "x", 0.0)
    assert lost(house.jobs.release, zombie.lease)
    assert lost(house.jobs.stop_cancelled, zombie.lease)
    assert lost(house.publish, zombie.lease)
    assert house.publish(second.lease) == 1
    assert lost(house.publish, second.lease)
    assert house.revisions_of("ft-1") == 1
    assert house.states("ft-1") == ["queued", "running", "queued", "running", "succeeded"]
    assert house.jobs.numbers().leases_lost == 1


def test_a_dead_owner_is_put_back_at_once_and_only_his_jobs(house: House) -> None:
    house.create("ft-1")
    house.create("ft-2")
    house.claim("dead")
    house.claim("alive")
    assert [job.job_id for job in house.jobs.expire_leases("dead")] == ["ft-1"]
    assert house.jobs.get("alice", "ft-2").state is JobState.RUNNING


def test_attempts_run_out(house: House) -> None:
    house.create("ft-1")
    for _ in range(3):
        house.claim("dead")
        house.jobs.expire_leases("dead")
    job = house.jobs.get("alice", "ft-1")
    assert (job.state, job.error_reason, job.attempt) == (JobState.FAILED, "ATTEMPTS_EXHAUSTED", 3)
    assert "3 attempts" in str(job.error_message)


def test_a_retry_waits_and_a_release_costs_no_attempt(house: House) -> None:
    house.create("ft-1")
    house.jobs.retry(house.claim().lease, "incident 1", 8.0)
    assert house.jobs.claim("worker", 30.0) is None
    house.clock.now += 8
    claimed = house.claim()
    assert claimed.job.attempt == 2
    house.jobs.release(claimed.lease)
    assert house.claim().job.attempt == 2


def test_cancelling(house: House) -> None:
    house.create("queued")
    assert house.jobs.cancel("alice", "queued").state is JobState.CANCELLED
    house.create("running")
    claimed = house.claim()
    asked = house.jobs.cancel("alice", "running")
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert house.jobs.heartbeat(claimed.lease, 30.0).cancel_requested is True
    with pytest.raises(Cancelled):
        house.publish(claimed.lease)
    assert house.revisions_of("running") == 0
    assert house.jobs.stop_cancelled(claimed.lease).state is JobState.CANCELLED
    assert house.jobs.cancel("alice", "running").state is JobState.CANCELLED
    assert house.states("running") == ["queued", "running", "cancelled"]


def test_a_cancelled_job_of_a_dead_worker_is_not_taken_again(house: House) -> None:
    for owner, end in (("dead", lambda lease: house.jobs.expire_leases("dead")), ("stops", house.jobs.release)):
        house.create(f"ft-{owner}")
        claimed = house.claim(owner)
        house.jobs.cancel("alice", claimed.job.job_id)
        end(claimed.lease)
        assert house.jobs.get("alice", claimed.job.job_id).state is JobState.CANCELLED


def test_a_failed_publication_leaves_the_job_running_and_no_revision(house: House) -> None:
    class Full(AdapterStore):
        def publish(self, *arguments: Any, **named: Any) -> Any:
            super().publish(*arguments, **named)
            raise ResourceExhausted(Reason.STORE_FULL, "full")

    house.create("ft-1")
    claimed = house.claim()
    full = Full(house.database, house.adapters._blobs, house.clock)
    with pytest.raises(ResourceExhausted):
        house.jobs.publish(claimed.lease, full, b"data", SMALL_ADAPTER, None)
    assert house.jobs.get("alice", "ft-1").state is JobState.RUNNING
    assert house.revisions_of("ft-1") == 0
    assert house.publish(claimed.lease) == 1


def test_tenants_see_only_their_own(house: House) -> None:
    house.create("ft-1", "alice")
    for call in (house.jobs.get, house.jobs.cancel):
        with pytest.raises(NotFound) as caught:
            call("bob", "ft-1")
        assert caught.value.reason is Reason.FINE_TUNE_NOT_FOUND
    assert house.jobs.list_jobs("bob", 10) == []


def test_the_quota_counts_jobs_that_have_not_ended(house: House) -> None:
    house.create("ft-1", limit=2)
    house.create("ft-2", limit=2)
    with pytest.raises(ResourceExhausted) as caught:
        house.create("ft-3", limit=2)
    assert caught.value.reason is Reason.TENANT_QUOTA
    assert caught.value.metadata == {"quota": "tenant_queued_jobs", "limit": "2", "used": "2"}
    assert caught.value.retry_after is not None
    house.create("ft-4", "bob", limit=2)
    house.jobs.cancel("alice", "ft-1")
    house.create("ft-5", limit=2)


def test_an_idempotency_key_queues_once(house: House) -> None:
    new = NewJob("ft-1", "alice", SPEC, "fox", "Fox", {})
    first, replayed = house.jobs.create(new, tenant_limit=1, idempotency_key="k", request_hash="h")
    assert not replayed
    again, replayed = house.jobs.create(
        replace(new, job_id="ft-2"), tenant_limit=1, idempotency_key="k", request_hash="h"
    )
    assert replayed
    assert again == first
    assert house.jobs.recall("alice", "k", "h") == first
    assert house.jobs.recall("bob", "k", "h") is None
    with pytest.raises(AlreadyExists):
        house.jobs.create(replace(new, job_id="ft-3"), tenant_limit=1, idempotency_key="k", request_hash="other")


def test_pages_neither_repeat_nor_skip(house: House) -> None:
    for number in range(7):
        house.create(f"ft-{number}")
        if number % 2:
            # Equal times: the id decides.
            house.clock.now -= 1
    seen: list[str] = []
    after = None
    while page := house.jobs.list_jobs("alice", 3, after):
        seen += [job.job_id for job in page]
        after = (page[-1].created, page[-1].job_id)
    assert sorted(seen) == [f"ft-{number}" for number in range(7)]
    assert [house.jobs.get("alice", job_id).created for job_id in seen] == sorted(
        (house.jobs.get("alice", job_id).created for job_id in seen), reverse=True
    )
    house.claim()
    assert len(house.jobs.list_jobs("alice", 10, states=[JobState.QUEUED])) == 6
    assert house.jobs.numbers().states[JobState.QUEUED] == 6
    assert len(house.jobs.open_jobs()) == 7


def test_old_samples_lose_their_picture_but_not_their_number(house: House) -> None:
    house.create("ft-1")
    claimed = house.claim()
    for step in range(KEPT_SAMPLES + 3):
        house.jobs.sample(claimed.lease, step, "", b"png")
    samples = [event for event in house.jobs.events("ft-1", limit=1000) if event.kind is EventKind.SAMPLE]
    assert len(samples) == KEPT_SAMPLES + 3
    assert [sample.data is None for sample in samples] == [True] * 3 + [False] * KEPT_SAMPLES


CLAIM_ALL = """
import sys
from hueshift.server.clock import SystemClock
from hueshift.server.store.database import Database
from hueshift.server.store.job_store import JobStore
jobs = JobStore(Database(sys.argv[1], SystemClock()), SystemClock())
sys.stdin.readline()
while claimed := jobs.claim("worker", 60.0):
    print(claimed.job.job_id)
"""


def test_a_reader_holds_few_pictures_at_a_time(house: House) -> None:
    house.create("one")
    lease = house.claim().lease
    sizes = [READ_BYTES // 2, READ_BYTES // 2, 7, READ_BYTES + 1, READ_BYTES, 1]
    for step, size in enumerate(sizes):
        house.jobs.progress(lease, step, 0.5, 0.1)
        house.jobs.sample(lease, step, "a prompt", b"x" * size)
    seen, after, reads = [], 2, 0
    while events := house.jobs.events("one", after):
        held = [len(event.data) for event in events if event.data is not None]
        assert sum(held) <= READ_BYTES or len(held) == 1
        seen += held
        after, reads = events[-1].sequence, reads + 1
    assert (seen, after) == (sizes, 2 + 2 * len(sizes))
    assert reads == 5


def test_two_processes_never_take_the_same_job(tmp_path: Path) -> None:
    house = House(tmp_path)
    for number in range(60):
        house.create(f"ft-{number}", f"tenant-{number % 3}")
    house.database.close()
    command = [sys.executable, "-P", "-c", CLAIM_ALL, str(tmp_path / "jobs.db")]
    pipe = subprocess.PIPE
    children = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda child: child.communicate("go\n", timeout=60)[0].split(), children))
    assert sorted(outputs[0] + outputs[1]) == sorted(f"ft-{number}" for number in range(60))
