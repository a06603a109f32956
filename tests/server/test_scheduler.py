"""The scheduler with its threads: nothing leaks, nothing is lost, and nobody gets another's adapter."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from generation_bench import Bench, Limits, collect, error_of, images
from structlog.testing import capture_logs
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import Cancelled, HueshiftError, NotFound, Reason, ResourceExhausted, Unavailable
from hueshift.engines.interface import Plan
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.samplers import SamplerKind
from hueshift.server.generation import GenerationHandle, GenerationRequest, ImageEvent


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A running scheduler; afterwards no thread of it may be left."""
    before = set(threading.enumerate())
    bench = Bench(threads=True, slots=4, max_batch=8)
    bench.scheduler.start()
    yield bench
    await asyncio.to_thread(bench.scheduler.close)
    left = {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("hueshift")}
    assert not left


async def idle(bench: Bench) -> None:
    """Wait until nothing is alive, and check that nothing is held."""
    for _ in range(1000):
        snapshot = bench.scheduler.snapshot()
        if snapshot.live == snapshot.preparing == snapshot.decoding == 0:
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError(snapshot)
    assert (snapshot.live, snapshot.waiting, snapshot.active, snapshot.rows, snapshot.slot_uses) == (0, 0, 0, 0, 0)
    assert bench.value("hueshift_active_samples") == bench.value("hueshift_queue_depth") == 0


async def test_a_request_runs_from_end_to_end(bench: Bench) -> None:
    handle = bench.submit(seeds=(1, 2), steps=5, adapters={"spec-0.4": 1.0}, prompt="sks", preview_interval=2)
    found = await images(handle)
    assert [picture.seed for picture in found] == [1, 2]
    timings = found[0].timings
    assert min(timings.queue, timings.denoise, timings.decode) > 0
    await idle(bench)


async def test_a_store_that_does_not_answer_holds_up_nobody_whose_adapters_are_at_hand(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, load = threading.Event(), bench.folder.load

    def load_late(content_hash: str) -> Adapter:
        if content_hash != "low-0.9":
            answers.wait(20)
        return load(content_hash)

    monkeypatch.setattr(bench.slots.host, "_load", load_late)
    await bench.scheduler.warm((("low-0.9", 1.0),), None)
    cold = [bench.submit(f"t{number}", {f"low-0.{number}": 1.0}) for number in range(1, 9)]
    cold += [bench.submit("greedy", {f"spec-0.{number}": 1.0}) for number in range(1, 9)]
    warming = [asyncio.create_task(bench.scheduler.warm(((f"low-0.0{number}", 1.0),), None)) for number in range(1, 9)]
    await asyncio.sleep(0.1)
    assert bench.scheduler.snapshot().preparing > 0
    try:
        for adapters in ({}, {"low-0.9": 1.0}):
            assert len(await asyncio.wait_for(images(bench.submit("a", adapters)), 10)) == 1
    finally:
        answers.set()
    for handle in cold:
        assert len(await images(handle)) == 1
    # Four slots are few: some may find all of them in use.
    warmed = await asyncio.gather(*warming, return_exceptions=True)
    assert {type(one) for one in warmed} <= {bool, ResourceExhausted}
    await idle(bench)


async def test_the_end_of_the_step_loop_ends_requests_and_the_server(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("a defect")

    first = bench.submit(steps=900)
    for name in ("tick", "end_all"):
        monkeypatch.setattr(bench.scheduler._loop, name, broken)
    with capture_logs() as logs:
        second = bench.submit()
        for handle in (first, second):
            error = await asyncio.wait_for(error_of(handle), 10)
            assert (type(error), error.reason) == (Unavailable, Reason.DEVICE_LOST)
    assert bench.scheduler.watch.lost.done()
    assert "step loop ended" in [line["event"] for line in logs]
    with pytest.raises(Unavailable):
        bench.submit()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(bench.scheduler.warm((("low-0.1", 1.0),)), 10)


async def test_warm_loads_once_and_pins(bench: Bench) -> None:
    assert await bench.scheduler.warm((("low-0.1", 1.0),), True)
    assert not await bench.scheduler.warm((("low-0.1", 1.0),), None)
    assert bench.scheduler.resident("low-0.1")
    for mark in ("low-0.2", "low-0.3", "low-0.4", "low-0.5"):
        await images(bench.submit(adapters={mark: 1.0}))
    assert bench.scheduler.resident("low-0.1")
    assert not bench.scheduler.resident("low-0.2")
    await bench.scheduler.warm((("low-0.5", 1.0),), True)
    with pytest.raises(ResourceExhausted) as refused:
        await bench.scheduler.warm((("low-0.4", 1.0),), True)
    assert refused.value.reason is Reason.SLOTS_EXHAUSTED
    await bench.scheduler.warm((("low-0.1", 1.0),), False)
    await bench.scheduler.warm((("low-0.4", 1.0),), True)
    bench.folder.deleted.add("low-0.9")
    with pytest.raises(NotFound):
        await bench.scheduler.warm((("low-0.9", 1.0),))


async def test_a_slow_load_stalls_nobody(bench: Bench) -> None:
    gate = threading.Event()
    load = bench.folder.load

    def slow(content_hash: str) -> Any:
        assert content_hash != "low-0.7" or gate.wait(20)
        return load(content_hash)

    bench.slots.host._load = slow
    waiting = bench.submit("a", adapters={"low-0.7": 1.0})
    for _ in range(3):
        await asyncio.wait_for(images(bench.submit("b", adapters={"low-0.1": 1.0})), 10)
    gate.set()
    assert len(await images(waiting)) == 1


async def test_the_event_loop_never_waits_for_a_step() -> None:
    bench = Bench(threads=True, engine=FakeEngine(on_call=lambda plan, slots: time.sleep(0.5)))
    bench.scheduler.start()
    handles = [bench.submit(seeds=(i,), steps=2) for i in range(4)]
    longest, reading = 0.0, asyncio.gather(*(collect(handle) for handle in handles))
    while not reading.done():
        begin = time.perf_counter()
        bench.scheduler.snapshot()
        bench.scheduler.resident("x")
        bench.submit(steps=1).cancel()
        longest = max(longest, time.perf_counter() - begin)
        await asyncio.sleep(0.01)
    await asyncio.to_thread(bench.scheduler.close)
    # A step takes 500 ms.
    assert longest < 0.3


async def test_draining_finishes_what_was_accepted() -> None:
    bench = Bench(threads=True, max_batch=2)
    bench.scheduler.start()
    handles = [bench.submit(seeds=(i, i + 1), steps=20) for i in range(10)]
    draining = asyncio.create_task(bench.scheduler.drain(30))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refused:
        bench.submit()
    assert refused.value.reason is Reason.DRAINING
    assert await draining
    for handle in handles:
        assert len(await images(handle)) == 2
    await asyncio.to_thread(bench.scheduler.close)


async def test_draining_gives_up_after_its_time_and_says_so() -> None:
    bench = Bench(threads=True, engine=FakeEngine(on_call=lambda plan, slots: time.sleep(0.02)))
    bench.scheduler.start()
    handle = bench.submit(steps=150)
    assert not await bench.scheduler.drain(0.1)
    with pytest.raises(Unavailable):
        await collect(handle)
    await idle(bench)
    await asyncio.to_thread(bench.scheduler.close)
    with pytest.raises(Unavailable):
        await bench.scheduler.warm((("low-0.1", 1.0),))


async def test_closing_ends_what_is_left_and_twice_is_fine() -> None:
    bench = Bench(threads=True, engine=FakeEngine(on_call=lambda plan, slots: time.sleep(0.02)))
    bench.scheduler.start()
    handles = [bench.submit(steps=150, seeds=(i,)) for i in range(20)]
    await asyncio.to_thread(bench.scheduler.close)
    await asyncio.to_thread(bench.scheduler.close)
    for handle in handles:
        with pytest.raises(Unavailable):
            await collect(handle)


async def test_a_defect_in_the_loop_ends_requests_but_not_serving(bench: Bench) -> None:
    hit = bench.submit(steps=100)
    with capture_logs() as logs:
        bench.scheduler._post(lambda: 1 / 0)  # type: ignore[arg-type]
        with pytest.raises(HueshiftError) as ended:
            await images(hit)
    assert [entry["event"] for entry in logs] == ["step loop failed"]
    assert ended.value.reason is Reason.INTERNAL
    assert len(await images(bench.submit())) == 1


def storm(bench: Bench, chance: random.Random) -> list[GenerationRequest]:
    """200 requests of four tenants, each tenant with adapters of its own."""
    samplers = [(SamplerKind.DDIM, 0.0), (SamplerKind.DDIM, 0.6), (SamplerKind.EULER, 0.0), (SamplerKind.DPMPP_2M, 0.0)]
    samplers.append((SamplerKind.LCM, 0.0))
    requests = []
    for i in range(200):
        tenant = chance.choice("abcd")
        own = [f"{kind}-{('abcd'.index(tenant) + 1) / 8 + shift}" for kind in ("low", "spec") for shift in (0, 0.03)]
        mixes: list[dict[str, float]] = [{}, {own[0]: 1.0}, {own[1]: 0.5}, {own[2]: 1.0}, {own[0]: 0.5, own[3]: -0.5}]
        sampler, eta = chance.choice(samplers)
        requests.append(
            bench.request(
                tenant,
                chance.choice(mixes),
                prompt=f"prompt {i % 7} sks",
                negative_prompt=chance.choice(["", "bad"]),
                seeds=tuple(chance.randrange(2**64) for _ in range(chance.choice([1, 1, 2, 3]))),
                steps=chance.randrange(1, 9),
                guidance_scale=chance.choice([1.0, 3.0, 7.5]),
                sampler=sampler,
                eta=eta,
                width=chance.choice([64, 64, 96]),
                format=chance.choice(list(PictureFormat)),
                preview_interval=chance.choice([0, 0, 2]),
                priority=chance.randrange(3),
                deadline=bench.clock.monotonic() + 300,
            )
        )
    return requests


async def alone(request: GenerationRequest) -> list[bytes]:
    """The files of a request that has a scheduler to itself."""
    bench = Bench()
    handle = bench.scheduler.submit(request)
    bench.run()
    bench.scheduler.close()
    return [picture.data for picture in await images(handle)]


async def test_a_storm_of_mixed_requests_with_cancellations() -> None:
    """Every picture equals its single-request reference byte for byte; nothing carries another's adapter or leaks."""
    before = set(threading.enumerate())
    chance = random.Random(20261120)
    bench = Bench(threads=True, slots=5, max_batch=8, limits=Limits(1000, 1000))
    bench.scheduler.start()
    requests = storm(bench, chance)
    cancelled = set(chance.sample(range(200), 60))

    async def one(i: int, handle: GenerationHandle) -> list[ImageEvent] | None:
        if i in cancelled:
            asyncio.get_running_loop().call_later(chance.random() * 0.8, handle.cancel)
        try:
            return await images(handle)
        except Cancelled:
            return None

    handles = []
    for request in requests:
        handles.append(bench.scheduler.submit(request))
        if len(handles) % 20 == 0:
            await asyncio.sleep(0.01)
    results = await asyncio.wait_for(asyncio.gather(*(one(i, handle) for i, handle in enumerate(handles))), 60)
    await idle(bench)
    gone = {i for i, found in enumerate(results) if found is None}
    assert gone <= cancelled
    assert len(gone) > 5
    compared = 0
    for request, found in zip(requests, results, strict=True):
        if found is None:
            continue
        assert all(picture.adapters == request.adapters for picture in found)
        assert all(a.name.startswith(f"tenants/{request.tenant}/") for picture in found for a in picture.adapters)
        assert len(found) == len(request.seeds)
        assert [picture.data for picture in found] == await alone(request)
        compared += 1
    assert compared >= 140
    assert len({rows for _, rows in bench.engine.calls}) > 3
    assert {plan for plan, _ in bench.engine.calls} == {Plan.DENSE, Plan.FACTORED}
    await asyncio.to_thread(bench.scheduler.close)
    assert not {t.name for t in set(threading.enumerate()) - before if t.name.startswith("hueshift")}
    assert len(asyncio.all_tasks()) == 1
    assert bench.slots.snapshot()["uses"] == 0


async def test_the_reference_tells_adapters_apart() -> None:
    """So that the storm would notice a picture with another tenant's adapter."""
    bench = Bench()
    marks = [f"low-{(i + 1) / 8 + shift}" for i in range(4) for shift in (0, 0.03)]
    pictures = [(await alone(bench.request(adapters={mark: 1.0}, prompt="p")))[0] for mark in marks]
    assert len(set(pictures)) == len(marks)


async def test_steps_of_a_failing_engine_never_stop_the_loop() -> None:
    calls = 0

    def sometimes(plan: Plan, slots: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("flaky")

    bench = Bench(threads=True, max_batch=2, engine=FakeEngine(max_batch=2, on_call=sometimes))
    bench.scheduler.start()
    with capture_logs() as logs:
        handles = [bench.submit(seeds=(i,), steps=1, adapters={"low-0.1": 1.0}) for i in range(30)]
        outcomes = await asyncio.gather(*(images(handle) for handle in handles), return_exceptions=True)
    assert {entry["event"] for entry in logs} == {"engine failed"}
    failed = [outcome for outcome in outcomes if isinstance(outcome, HueshiftError)]
    assert 0 < len(failed) < 30
    assert all(error.reason is Reason.INTERNAL for error in failed)
    await idle(bench)
    await asyncio.to_thread(bench.scheduler.close)
