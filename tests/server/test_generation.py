"""The whole path on the embedded model and its default engine: mixed requests together equal the same ones alone."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from embedded_adapters import random_lowrank, random_spectral
from generation_bench import Limits, images
from PIL import Image
from prometheus_client import CollectorRegistry

from hueshift.adapters.adapter import Adapter
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import AdapterEngine, EngineOptions, build_engine
from hueshift.engines.conditioning import make_conditioner
from hueshift.engines.interface import Plan
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.residency import SlotCache
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.samplers import SamplerKind
from hueshift.engines.vae import VaeStage
from hueshift.server.clock import SystemClock
from hueshift.server.generation import AppliedAdapter, GenerationRequest, ImageEvent
from hueshift.server.metrics import Metrics
from hueshift.server.residency_metrics import ResidencyMetrics
from hueshift.server.scheduler import Scheduler

# Levels of 255 by which a picture made in company may differ from the same one made alone (see
# tests/engines/test_batch_independence.py), and the least by which adapters must change a picture.
TOLERANCE = 2
CHANGE = 60
Picture = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def engine(base_model: BaseModel, cache_dir: Path) -> AdapterEngine:
    """The default engine of a CPU, with fewer slots than the tests have mixes."""
    return build_engine(base_model, EngineOptions(cache_dir=cache_dir, kind="onnxruntime", slots=4, max_batch=8))


@pytest.fixture(scope="module")
def adapters(base_model: BaseModel, engine: AdapterEngine) -> dict[str, Adapter]:
    """Adapters by content hash."""
    return {
        "spectral-1": random_spectral(base_model, engine.factors, 1, word="sks"),
        "spectral-2": random_spectral(base_model, engine.factors, 2),
        "lowrank-1": random_lowrank(base_model, engine.rows, 3),
        "lowrank-2": random_lowrank(base_model, engine.rows, 4),
    }


@pytest.fixture
async def scheduler(
    base_model: BaseModel, engine: AdapterEngine, adapters: dict[str, Adapter]
) -> AsyncIterator[Scheduler]:
    """A running scheduler."""
    metrics = Metrics(CollectorRegistry())
    observer = ResidencyMetrics(metrics)
    host = HostCache(adapters.__getitem__, 2**30, observer)
    slots = SlotCache(engine, RowCache(host, engine.rows, engine.factors, engine.norms, 10**8, observer), observer)
    scheduler = Scheduler(
        engine,
        base_model,
        make_conditioner(base_model, engine.factors),
        VaeStage(base_model),
        slots,
        metrics,
        SystemClock(),
        Limits(),
    )
    scheduler.start()
    yield scheduler
    await asyncio.to_thread(scheduler.close)


def make_request(number: int, mix: dict[str, float], **given: Any) -> GenerationRequest:
    """A request with small defaults."""
    fields: dict[str, Any] = {
        "prompt": "a red fox sks",
        "negative_prompt": "",
        "seeds": (number,),
        "steps": 5,
        "guidance_scale": 5.0,
        "sampler": SamplerKind.DDIM,
        "eta": 0.0,
        "width": 128,
        "height": 128,
        "format": PictureFormat.PNG,
        "preview_interval": 0,
        "priority": 0,
        "deadline": SystemClock().monotonic() + 280,
    }
    applied = tuple(AppliedAdapter(key, 1, key, weight) for key, weight in mix.items())
    return GenerationRequest(request_id=f"r{number}", tenant=f"t{number % 3}", adapters=applied, **(fields | given))


def pixels(event: ImageEvent) -> Picture:
    """Decode a picture."""
    return np.asarray(Image.open(io.BytesIO(event.data)).convert("RGB")).astype(np.int64)


async def test_mixed_requests_together_equal_the_same_alone(scheduler: Scheduler) -> None:
    requests = [
        make_request(0, {}),
        make_request(1, {"spectral-1": 1.0}, sampler=SamplerKind.EULER, prompt="sks on a hill"),
        make_request(2, {"lowrank-1": 1.0}, sampler=SamplerKind.DPMPP_2M, steps=6, negative_prompt="blurry"),
        make_request(3, {"spectral-2": 0.5, "lowrank-2": -0.5}, guidance_scale=1.0),
        make_request(4, {"spectral-1": 1.0}, sampler=SamplerKind.LCM, steps=3, guidance_scale=1.0),
        make_request(5, {"lowrank-2": 1.0}, eta=0.7, steps=4, seeds=(5, 6)),
    ]
    together = await asyncio.gather(*(images(scheduler.submit(request)) for request in requests))
    for request, found in zip(requests, together, strict=True):
        alone = await images(scheduler.submit(request))
        for mine, theirs in zip(found, alone, strict=True):
            difference = int(np.abs(pixels(mine) - pixels(theirs)).max())
            assert difference <= TOLERANCE, f"{request.request_id}, seed {mine.seed}: {difference}"
    assert scheduler.snapshot().slot_uses == 0


async def test_the_base_is_the_same_file_before_and_after_adapters(scheduler: Scheduler) -> None:
    plain = make_request(7, {}, steps=4)
    before = await images(scheduler.submit(plain))
    assert before[0].plans == (Plan.DENSE,)
    adapted = [make_request(7, {key: 1.0}, steps=4) for key in ("spectral-1", "lowrank-1")]
    for request in adapted:
        found = await images(scheduler.submit(request))
        assert int(np.abs(pixels(found[0]) - pixels(before[0])).max()) > CHANGE
    assert (await images(scheduler.submit(plain)))[0].data == before[0].data
