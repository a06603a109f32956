"""Weights of tenants: who has three times the weight gets three times the steps, and three times the device seconds."""

import asyncio
import threading
from collections import Counter
from pathlib import Path

import pytest
from fake_clock import FakeClock
from fake_engine import FakeEngine
from generation_bench import Bench
from postgres import fresh_database
from small_jobs import small_spec
from torch import Tensor
from whole_server import BoundedFakeEngine, LiveServer, fake_parts, live_server

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Plan
from hueshift.server.settings import load_settings
from hueshift.server.store.job_records import NewJob
from hueshift.server.store.stores import open_stores
from hueshift.v1 import generation_pb2 as pb

WEIGHTS = {"acme": 3.0}


@pytest.mark.parametrize("wrong", [{"acme": 0}, {"acme": -1}, {"acme": "nan"}, {"acme": 5000}, {"Not A Tenant": 2}])
def test_wrong_weights_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match=r"limits\.tenant_weights"):
        load_settings(None, limits={"tenant_weights": wrong})


def test_weights_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUESHIFT_LIMITS__TENANT_WEIGHTS", '{"acme": 3}')
    assert load_settings(None).limits.tenant_weights == WEIGHTS


async def test_steps_follow_the_weights() -> None:
    slots: list[int] = []
    engine = FakeEngine(slots=4, max_batch=1, on_call=lambda plan, rows: slots.append(int(rows[0])))
    bench = Bench(engine=engine, weights=WEIGHTS)
    adapters = {"acme": "low-0.1", "other": "low-0.2"}
    for _ in range(20):
        for tenant, adapter in adapters.items():
            bench.submit(tenant, {adapter: 1.0})
    bench.run()
    place = {bench.slots.slot_of(((adapter, 1.0),)): tenant for tenant, adapter in adapters.items()}
    bench.scheduler.close()
    # Four steps a picture; both have work waiting all that time.
    assert Counter(place[slot] for slot in slots[:96]) == {"acme": 72, "other": 24}


async def test_a_server_draws_by_the_weights_of_its_settings(base_model: BaseModel, tmp_path: Path) -> None:
    begin = threading.Event()
    order: list[str] = []

    def hold(plan: Plan, rows: Tensor) -> None:
        begin.wait(30)

    engine = BoundedFakeEngine(max_batch=2, on_call=hold)

    async def draw(live: LiveServer, tenant: str) -> None:
        stubs = await live.caller(tenant)
        request = pb.GenerateRequest(prompt="a fox", steps=2, count=6, width=64, height=64)
        async for event in stubs.generation.Generate(request, metadata=stubs.metadata, timeout=60):
            if event.HasField("image"):
                order.append(tenant)

    async with live_server(tmp_path, fake_parts(base_model, engine), limits={"tenant_weights": {"acme": 9}}) as live:
        drawing = [asyncio.create_task(draw(live, tenant)) for tenant in ("other", "acme")]
        async with asyncio.timeout(20):
            while live.services.scheduler.snapshot().live < 2:  # noqa: ASYNC110 (a snapshot cannot set an event)
                await asyncio.sleep(0.02)
        begin.set()
        await asyncio.gather(*drawing)
    # The first picture may have been begun before both were there; at equal weights they would take turns.
    assert order[:7].count("acme") >= 5


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_device_seconds_follow_the_weights(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = ""
    if kind == "postgres":
        url = fresh_database(request.getfixturevalue("postgres_server"), "weights")
    clock = FakeClock()
    clock.now = 20_000 * 86400.0
    settings = load_settings(
        None,
        store={"path": tmp_path, "database_url": url},
        limits={"tenant_weights": WEIGHTS},
    )
    stores = open_stores(settings, clock)
    for number in range(30):
        for tenant in ("acme", "other"):
            new = NewJob(f"{tenant}-{number}", tenant, small_spec(), "a", "a", {})
            stores.jobs.create(new, tenant_limit=100)
    taken: Counter[str] = Counter()
    for _ in range(32):
        claimed = stores.jobs.claim("worker", 60.0)
        assert claimed is not None
        clock.now += 10
        stores.jobs.fail(claimed.lease, "X", "x")
        taken[claimed.job.tenant] += 1
    assert taken == {"acme": 24, "other": 8}
    # And so do devices at a time, before a second is counted.
    clock.now += 86400
    held = Counter(claimed.job.tenant for _ in range(4) if (claimed := stores.jobs.claim("worker", 60.0)))
    assert held == {"acme": 3, "other": 1}
    stores.close()
