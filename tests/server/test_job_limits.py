"""A job that takes too long or too much is stopped between two steps, and ended from outside when it is stuck."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_clock import FakeClock
from small_jobs import small_spec

from hueshift.adapters.errors import Reason
from hueshift.server import job_limits
from hueshift.server.job_lease import STUCK_SECONDS, LeaseKeeper
from hueshift.server.job_limits import JobLimits, resident_bytes
from hueshift.server.store.database import Database
from hueshift.server.store.job_records import ClaimedJob, JobState, NewJob
from hueshift.server.store.job_store import JobStore


class Bench:
    """A job taken by a worker, on a clock moved by hand."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.database = Database(folder / "h.db", self.clock)
        self.jobs = JobStore(self.database, self.clock)
        self.jobs.create(NewJob("ft-1", "alice", small_spec(), "fox", "Fox", {}), tenant_limit=1)
        self.claimed = self.claim()
        self.ended: list[str] = []

    def claim(self) -> ClaimedJob:
        claimed = self.jobs.claim("worker", 1e6)
        assert claimed is not None
        return claimed

    def keeper(self, limits: JobLimits) -> LeaseKeeper:
        return LeaseKeeper(
            self.jobs, self.claimed.lease, 1e6, self.clock, limits=limits, stuck=lambda: self.ended.append("killed")
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.database.close()


def test_time_counts_over_all_attempts(bench: Bench) -> None:
    limits = JobLimits(seconds=10)
    bench.clock.now += 6
    keeper = bench.keeper(limits)
    keeper.renew()
    assert not keeper.should_stop
    bench.jobs.release(bench.claimed.lease)
    # The time in the queue is not the job's.
    bench.clock.now += 100
    bench.claimed = bench.claim()
    bench.clock.now += 5
    keeper = bench.keeper(limits)
    keeper.renew()
    assert keeper.should_stop
    assert keeper.over is not None
    assert keeper.over.reason is Reason.JOB_TIME_LIMIT


def test_memory_is_looked_at_with_every_heartbeat(bench: Bench) -> None:
    held = [100]
    keeper = bench.keeper(JobLimits(memory=1000, measure=lambda: held[0]))
    keeper.renew()
    assert not keeper.should_stop
    held[0] = 1001
    keeper.renew()
    assert keeper.over is not None
    assert keeper.over.reason is Reason.JOB_MEMORY_LIMIT
    assert "1001 bytes; allowed: 1000" in keeper.over.message


def test_a_stuck_job_is_failed_and_its_process_ended(bench: Bench) -> None:
    keeper = bench.keeper(JobLimits(seconds=1))
    bench.clock.now += 2
    keeper.renew()
    bench.clock.now += STUCK_SECONDS - 1
    keeper.renew()
    assert bench.ended == []
    assert bench.jobs.get("alice", "ft-1").state is JobState.RUNNING
    bench.clock.now += 2
    keeper.renew()
    job = bench.jobs.get("alice", "ft-1")
    assert (job.state, job.error_reason, bench.ended) == (JobState.FAILED, "JOB_TIME_LIMIT", ["killed"])


def test_without_limits_nothing_is_measured(bench: Bench) -> None:
    def measure() -> int:
        raise AssertionError("measured")

    keeper = bench.keeper(JobLimits(measure=measure))
    bench.clock.now += 1e6
    keeper.renew()
    assert not keeper.should_stop


def test_resident_bytes_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = resident_bytes()
    assert 10_000_000 < now < 100_000_000_000
    monkeypatch.setattr(job_limits, "_STATM", tmp_path / "absent")
    assert resident_bytes() >= 0.5 * now
