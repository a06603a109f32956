"""The numbers of the job table as a whole: states, leases lost, training steps that are still to do."""

from pathlib import Path

from fake_clock import FakeClock
from small_jobs import small_spec

from hueshift.server.store.database import Database
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.job_store import JobStore


def test_the_table_is_counted_over_all_tenants(tmp_path: Path) -> None:
    clock = FakeClock()
    database = Database(tmp_path / "jobs.db", clock)
    jobs = JobStore(database, clock)
    empty = jobs.numbers()
    assert (set(empty.states.values()), empty.leases_lost, empty.steps_left) == ({0}, 0, 0)
    steps = small_spec().steps
    for tenant in ("alice", "bob", "carol"):
        jobs.create(NewJob(f"ft-{tenant}", tenant, small_spec(), tenant, "", {}), tenant_limit=1)
    claimed = jobs.claim("worker", 30.0)
    assert claimed is not None
    jobs.progress(claimed.lease, 1, 0.5, 0.1)
    numbers = jobs.numbers()
    assert (numbers.states[JobState.QUEUED], numbers.states[JobState.RUNNING]) == (2, 1)
    assert numbers.steps_left == 3 * steps - 1
    # What has ended has nothing left, however far it came.
    jobs.fail(claimed.lease, "TRAINING_DIVERGED", "no")
    jobs.cancel("bob", "ft-bob")
    numbers = jobs.numbers()
    assert numbers.steps_left == steps
    assert (numbers.states[JobState.FAILED], numbers.states[JobState.CANCELLED]) == (1, 1)
    database.close()
