"""Device seconds of jobs that share a worker: each its part, all together no more than what passed."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fake_clock import FakeClock
from small_jobs import SMALL_ADAPTER, small_spec

from hueshift.adapters.errors import ResourceExhausted
from hueshift.server.device_meter import DeviceMeter, step_rows
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_quotas import JobQuotas
from hueshift.server.store.job_records import NewJob
from hueshift.server.store.job_store import JobStore


def test_time_is_divided_by_rows_among_those_who_are_there() -> None:
    clock = FakeClock()
    meter = DeviceMeter(clock)
    clock.advance(100)
    with meter.running("a", 3):
        clock.advance(10)
        assert meter.used("a") == 10
        with meter.running("b", 1, seconds=7.0):
            clock.advance(8)
            assert (meter.used("a"), meter.used("b")) == (16, 9)
        assert meter.used("b") is None
        clock.advance(1)
        assert meter.used("a") == 17


def test_a_job_taken_again_while_its_lost_attempt_still_ends_is_counted_once() -> None:
    clock = FakeClock()
    meter = DeviceMeter(clock)
    with ExitStack() as newer:
        with meter.running("a", 1):
            clock.advance(10)
            newer.enter_context(meter.running("a", 1, seconds=4.0))
            clock.advance(5)
        clock.advance(2)
        assert meter.used("a") == 11
    assert meter.used("a") is None


def test_class_pictures_are_rows_too() -> None:
    spec = replace(small_spec(), batch_size=3, prior_weight=0.0)
    assert [step_rows(spec), step_rows(replace(spec, prior_weight=0.5))] == [3, 6]


def test_jobs_of_one_worker_are_charged_their_shares(tmp_path: Path) -> None:
    clock = FakeClock()
    database = Database(tmp_path / "h.db", clock)
    meter = DeviceMeter(clock)
    table = JobStore(database, clock, quotas=JobQuotas(seconds=14))
    jobs = table.metered(meter.used)
    adapters = AdapterStore(database, BlobStore(tmp_path / "blobs"), clock)
    spec = replace(small_spec(), batch_size=1, prior_weight=0.0)
    for job_id, size in (("ft-1", 1), ("ft-2", 3)):
        jobs.create(NewJob(job_id, "alice", replace(spec, batch_size=size), job_id, "x", {}), tenant_limit=9)
    leases = []
    with ExitStack() as hand:
        for _ in range(2):
            claimed = jobs.claim("worker", 60.0)
            assert claimed is not None
            hand.enter_context(meter.running(claimed.job.job_id, step_rows(claimed.job.spec)))
            leases.append(claimed.lease)
        clock.advance(8)
        assert [jobs.heartbeat(lease, 60.0).device_seconds for lease in leases] == [2, 6]
        clock.advance(4)
        ended = jobs.publish(leases[0], adapters, b"file", SMALL_ADAPTER, None)
        assert (ended.device_seconds, ended.step) == (3, spec.steps)
    with meter.running("ft-2", 3, jobs.get("alice", "ft-2").device_seconds):
        # Counted on from the record, however late the next heartbeat comes.
        clock.advance(5)
        assert jobs.release(leases[1]).device_seconds == 11
    # The day's quota counts shares: 3 and 11 seconds of the 17 that both were in hand.
    with pytest.raises(ResourceExhausted, match="have used 14 device seconds"):
        jobs.check_quota("alice", 9)
    database.close()


def test_a_job_that_stopped_early_shows_its_last_step(tmp_path: Path) -> None:
    clock = FakeClock()
    database = Database(tmp_path / "h.db", clock)
    jobs = JobStore(database, clock)
    adapters = AdapterStore(database, BlobStore(tmp_path / "blobs"), clock)
    jobs.create(NewJob("ft-1", "alice", replace(small_spec(), steps=500), "fox", "Fox", {}), tenant_limit=9)
    claimed = jobs.claim("worker", 60.0)
    assert claimed is not None
    # Progress is thinned, so the last report may be of an earlier step.
    jobs.progress(claimed.lease, 338, 0.5, 0.1)
    ended = jobs.publish(claimed.lease, adapters, b"file", SMALL_ADAPTER, None, 340)
    assert (ended.step, ended.steps) == (340, 500)
    assert jobs.events("ft-1")[-1].payload["step"] == 340
    database.close()
