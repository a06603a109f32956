"""What is cleaned, what stays, and that a failed round does not end the rounds."""

import asyncio
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa
from fake_clock import FakeClock
from postgres import fresh_database
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from small_jobs import small_spec

from hueshift.adapters.errors import Reason, Unavailable
from hueshift.server import housekeeping
from hueshift.server.clock import SystemClock
from hueshift.server.housekeeping import IDEMPOTENCY_SECONDS, ORPHAN_SECONDS, Keeping, clean, keep_clean
from hueshift.server.metrics import Metrics
from hueshift.server.settings import Settings, StoreSettings
from hueshift.server.store.job_events import forget_samples
from hueshift.server.store.job_records import EventKind, NewJob
from hueshift.server.store.stores import Stores, open_stores
from hueshift.server.store.tables import idempotency


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    return open_stores(Settings(store=StoreSettings(path=tmp_path)), SystemClock())


def _keep_answer(stores: Stores, key: str, created: float) -> None:
    row = {"tenant": "acme", "method": "m", "key": key, "request_hash": "h", "result": {}, "created": created}
    with stores.database.write() as connection:
        connection.execute(sa.insert(idempotency).values(**row))


def _answers(stores: Stores) -> set[str]:
    with stores.database.read() as connection:
        return set(connection.execute(sa.select(idempotency.c.key)).scalars())


def test_old_answers_and_old_orphans_go(stores: Stores, tmp_path: Path) -> None:
    now = time.time()
    _keep_answer(stores, "old", now - IDEMPOTENCY_SECONDS - 60)
    _keep_answer(stores, "new", now)
    blobs = stores.adapters._blobs
    old, new = blobs.put(b"old orphan"), blobs.put(b"new orphan")
    os.utime(blobs.path(old), (now - ORPHAN_SECONDS - 60,) * 2)
    assert clean(stores, SystemClock(), Keeping()) == {"bytes": len(b"old orphan"), "answers": 1}
    assert _answers(stores) == {"new"}
    assert not blobs.path(old).exists()
    assert blobs.path(new).exists()
    stores.close()


async def test_a_failed_round_is_not_the_last(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    loop, fourth = asyncio.get_running_loop(), asyncio.Event()

    def fail_once(*_parts: object, **_named: object) -> Counter[str]:
        nonlocal rounds
        rounds += 1
        if rounds == 4:
            loop.call_soon_threadsafe(fourth.set)
        if rounds == 1:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "busy")
        if rounds == 2:
            # What nobody thought of is no reason to stop either.
            raise RuntimeError("database disk image is malformed")
        return Counter()

    monkeypatch.setattr(housekeeping, "clean", fail_once)
    metrics = Metrics(CollectorRegistry())
    task = asyncio.create_task(keep_clean(stores, SystemClock(), Keeping(), every=0.01, observer=metrics))
    async with asyncio.timeout(5):
        await fourth.wait()
    task.cancel()
    told = {"task": "housekeeping"}
    assert metrics.registry.get_sample_value("hueshift_background_failures_total", told) == 2
    assert metrics.registry.get_sample_value("hueshift_background_failing", told) == 0
    stores.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_many_samples_go_a_few_in_each_transaction(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = fresh_database(request.getfixturevalue("postgres_server"), "samples") if kind == "postgres" else ""
    clock = FakeClock()
    stores = open_stores(Settings(store=StoreSettings(path=tmp_path, database_url=SecretStr(url))), clock)
    for job_id in ("ft-1", "ft-2"):
        stores.jobs.create(NewJob(job_id, "acme", small_spec(), "fox", "Fox", {}), tenant_limit=9)
        claimed = stores.jobs.claim("worker", 1e9)
        assert claimed is not None
        for step in range(4):
            stores.jobs.sample(claimed.lease, step, "a fox", b"png")
        stores.jobs.fail(claimed.lease, "TRAINING_DIVERGED", "why")
    clock.advance(101)
    with stores.database.write() as connection:
        assert forget_samples(connection, clock.time() - 100, 3) == 3
    monkeypatch.setattr(housekeeping, "AT_ONCE", {**housekeeping.AT_ONCE, "samples": 2})
    clean(stores, clock, Keeping(samples=100))
    events = [event for job_id in ("ft-1", "ft-2") for event in stores.jobs.events(job_id)]
    assert [event.data for event in events if event.kind is EventKind.SAMPLE] == [None] * 8
    stores.close()


def test_samples_of_long_ended_jobs_lose_their_pictures(tmp_path: Path) -> None:
    clock = FakeClock()
    stores = open_stores(Settings(store=StoreSettings(path=tmp_path)), clock)
    for job_id in ("ft-old", "ft-running"):
        stores.jobs.create(NewJob(job_id, "acme", small_spec(), "fox", "Fox", {}), tenant_limit=9)
        claimed = stores.jobs.claim("worker", 1e9)
        assert claimed is not None
        stores.jobs.sample(claimed.lease, 1, "a fox", b"png")
        if job_id == "ft-old":
            stores.jobs.fail(claimed.lease, "TRAINING_DIVERGED", "why")
    clock.advance(100)
    clean(stores, clock, Keeping())
    clean(stores, clock, Keeping(samples=100))
    assert [event.data for event in stores.jobs.events("ft-old") if event.kind is EventKind.SAMPLE] == [b"png"]
    clock.advance(1)
    clean(stores, clock, Keeping(samples=100))
    # The event stays, so that the numbers have no gap.
    (old,) = (event for event in stores.jobs.events("ft-old") if event.kind is EventKind.SAMPLE)
    (new,) = (event for event in stores.jobs.events("ft-running") if event.kind is EventKind.SAMPLE)
    assert (old.data, old.payload["prompt"], new.data) == (None, "a fox", b"png")
    stores.close()
