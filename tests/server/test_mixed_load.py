"""200 concurrent requests of four tenants on the real engine, some cancelled: every picture is its own reference's.

The same seed gives the same picture alone or in company within two grey levels of 255 (mean below 0.05): a batched
matrix product adds up in another order than a single one, which moves latents by about 1e-5 and a pixel that sits
between two levels by one.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import torch
from PIL import Image
from whole_server import LiveServer, RpcStubs, live_server

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import EngineOptions, build_engine
from hueshift.server.services import ServingParts
from hueshift.v1 import generation_pb2 as pb

TENANTS = ("acme", "blue", "cyan", "dune")
REQUESTS = 200
CANCELLED_SHARE = 0.3
LEVELS, MEAN_LEVELS = 2, 0.05
# Pictures of different adapters differ by far more than the tolerance.
DISTINCT_MEAN = 1.0
Pixels = npt.NDArray[np.int16]


@pytest.fixture(scope="module")
def parts(base_model: BaseModel, cache_dir: Path) -> ServingParts:
    """The default engine of a CPU over the embedded model."""
    engine = build_engine(base_model, EngineOptions(cache_dir=cache_dir, slots=7, max_batch=16))
    return ServingParts(base_model, engine, engine.rows, engine.factors, engine.norms)


@pytest_asyncio.fixture
async def live(parts: ServingParts, tmp_path: Path) -> AsyncIterator[LiveServer]:
    limits = {"queue_size": 1000, "tenant_queue_size": 1000}
    # Deadlines are tested elsewhere; here a slow machine must not look like a wrong picture.
    async with live_server(tmp_path, parts, limits=limits, server={"default_deadline_seconds": 250}) as server:
        yield server


def spectral_file(parts: ServingParts, seed: int) -> bytes:
    """Random shifts of a tenth of every singular value."""
    draw = torch.Generator().manual_seed(seed)
    shifts = {
        name: 0.1 * sigma * torch.randn(sigma.shape, generator=draw) for name, sigma in parts.factors.sigma.items()
    }
    return write_adapter(Adapter(AdapterKind.SPECTRAL, parts.base.base_hash, "svdiff", spectral=shifts))


def lowrank_file(parts: ServingParts, seed: int) -> bytes:
    """Random residuals of rank 2 on every target."""
    draw = torch.Generator().manual_seed(seed)
    factors = {
        target.name: LowRankFactors(
            torch.randn(2, target.cols, generator=draw) / target.cols**0.5,
            torch.randn(target.rows, 2, generator=draw) * 0.3,
        )
        for target in parts.rows.targets
    }
    return write_adapter(Adapter(AdapterKind.LOWRANK, parts.base.base_hash, "residuals", lowrank=factors))


def make_requests(random: Random) -> list[pb.GenerateRequest]:
    """Six requests of one tenant, two without adapters: all samplers, guided or not, of two to four steps.

    Small pictures, because 250 of the native size take a minute of two cores; the other tests draw the native size.
    """
    mixes: list[list[pb.AdapterUse]] = [
        [],
        [],
        [pb.AdapterUse(adapter="spectral")],
        [pb.AdapterUse(adapter="lowrank")],
        [pb.AdapterUse(adapter="spectral", weight=-0.5)],
        [pb.AdapterUse(adapter="lowrank", weight=0.5), pb.AdapterUse(adapter="spectral", weight=0.7)],
    ]
    return [
        pb.GenerateRequest(
            prompt=random.choice(("a fluent 3d emoji of a fox", "an emoji of a cloud", "a red car")),
            adapters=mix,
            count=random.choice((1, 1, 2)),
            seeds=[random.randrange(2**64)],
            width=64,
            height=64,
            steps=random.choice((2, 2, 3, 4)),
            guidance_scale=random.choice((1.0, 5.0)),
            sampler=random.choice((pb.SAMPLER_DDIM, pb.SAMPLER_EULER, pb.SAMPLER_DPMPP_2M, pb.SAMPLER_LCM)),
        )
        for mix in mixes
    ]


def pixels(data: bytes) -> Pixels:
    return np.asarray(Image.open(BytesIO(data)), dtype=np.int16)


async def draw(caller: RpcStubs, request: pb.GenerateRequest) -> list[pb.Image]:
    call = caller.generation.Generate(request, metadata=caller.metadata)
    images = [event.image async for event in call if event.HasField("image")]
    return sorted(images, key=lambda image: image.index)


async def draw_or_leave(caller: RpcStubs, request: pb.GenerateRequest, events: int) -> list[pb.Image] | None:
    """Draw, but cancel after that many events; None if it had not ended by then."""
    call = caller.generation.Generate(request, metadata=caller.metadata)
    images: list[pb.Image] = []
    for _ in range(events):
        event = await call.read()
        if event is grpc.aio.EOF:
            return sorted(images, key=lambda image: image.index)
        if event.HasField("image"):
            images.append(event.image)
    call.cancel()
    return None


def check(images: list[pb.Image], reference: list[pb.Image]) -> None:
    assert len(images) == len(reference)
    for image, expected in zip(images, reference, strict=True):
        assert (image.seed, list(image.adapters)) == (expected.seed, list(expected.adapters))
        error = np.abs(pixels(image.data) - pixels(expected.data))
        assert error.max() <= LEVELS
        assert error.mean() <= MEAN_LEVELS


async def upload_adapters(live: LiveServer, parts: ServingParts) -> dict[str, RpcStubs]:
    """Give every tenant adapters of its own, under the same two names."""
    callers = {tenant: await live.caller(tenant) for tenant in TENANTS}
    for number, caller in enumerate(callers.values()):
        await caller.import_adapter("spectral", spectral_file(parts, number))
        await caller.import_adapter("lowrank", lowrank_file(parts, 100 + number))
    return callers


@pytest.mark.slow
async def test_mixed_requests_equal_their_references_and_nothing_leaks(live: LiveServer, parts: ServingParts) -> None:
    random = Random(20)
    callers = await upload_adapters(live, parts)
    requests = {tenant: make_requests(random) for tenant in TENANTS}
    references = {
        (tenant, index): await draw(callers[tenant], request)
        for tenant, own in requests.items()
        for index, request in enumerate(own)
    }
    tasks_before, threads_before = len(asyncio.all_tasks()), threading.active_count()

    async def one(number: int) -> bool:
        tenant = TENANTS[number % len(TENANTS)]
        index = random.randrange(len(requests[tenant]))
        events = random.randrange(4) if random.random() < CANCELLED_SHARE else 1000
        images = await draw_or_leave(callers[tenant], requests[tenant][index], events)
        if images is None:
            return False
        check(images, references[tenant, index])
        own = f"tenants/{tenant}/adapters/"
        assert all(use.adapter.startswith(own) for image in images for use in image.adapters)
        return True

    finished = await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    # Both really happened: requests that were left, and far more that ended well.
    assert REQUESTS * (1 - CANCELLED_SHARE) * 0.8 <= sum(finished) < REQUESTS
    await expect_idle(live)
    sample = live.frame.metrics.registry.get_sample_value
    assert (sample("hueshift_samples_ended_total", {"outcome": "failed"}) or 0) == 0
    assert (sample("hueshift_batch_adapters_sum") or 0) > 1.5 * (sample("hueshift_batch_adapters_count") or 1)
    assert len(asyncio.all_tasks()) <= tasks_before
    # The default executor may have grown to its bound; nothing else starts threads.
    assert threading.active_count() <= threads_before + 32


async def expect_idle(live: LiveServer) -> None:
    """Wait for the last cancelled requests to be gone: no requests, samples or uses of slots are left."""
    for _ in range(200):
        snapshot = live.services.scheduler.snapshot()
        left = (
            snapshot.live,
            snapshot.waiting,
            snapshot.rows,
            snapshot.preparing,
            snapshot.decoding,
            snapshot.slot_uses,
        )
        if not any(left) and live.frame.gate.inside == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"after ten seconds there is left: {snapshot}, {live.frame.gate.inside} calls")


async def test_adapters_of_one_name_are_the_tenants_own(live: LiveServer, parts: ServingParts) -> None:
    """Four tenants' adapters of one name, one prompt and seed, in one batch: five distinct pictures with the base's."""
    callers = await upload_adapters(live, parts)
    plain = pb.GenerateRequest(prompt="a fluent 3d emoji of a fox", seeds=[1], steps=4)
    for kind in ("spectral", "lowrank"):
        adapted = pb.GenerateRequest()
        adapted.CopyFrom(plain)
        adapted.adapters.add(adapter=kind)
        drawn = await asyncio.gather(
            draw(callers["acme"], plain), *(draw(caller, adapted) for caller in callers.values())
        )
        pictures = [pixels(images[0].data) for images in drawn]
        for i, first in enumerate(pictures):
            for second in pictures[:i]:
                assert np.abs(first - second).mean() > DISTINCT_MEAN
        # The base's picture is the same to the bit in any company of adapters that need no other plan.
        again = await draw(callers["acme"], plain)
        assert np.abs(pixels(again[0].data) - pictures[0]).max() <= LEVELS


async def test_a_storm_of_cancellations_leaves_nothing(live: LiveServer) -> None:
    caller = await live.caller("acme")
    request = pb.GenerateRequest(prompt="a fox", steps=50, count=4)
    calls: list[Any] = [caller.generation.Generate(request, metadata=caller.metadata) for _ in range(40)]
    await asyncio.gather(*(call.read() for call in calls))
    for call in calls:
        call.cancel()
    await expect_idle(live)
    assert len(await caller.images(steps=1)) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in caller.generation.Generate(request, metadata=caller.metadata, timeout=0.3)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await expect_idle(live)
