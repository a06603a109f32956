"""What happens to a request beside its steps never makes a thread wait for those that a GPU still has to do."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from fake_engine import FakeEngine
from fake_gpu import GPU, FakeGpu, fake_gpu
from generation_bench import Bench, FakeConditioner, FakeVae, tiny_base
from PIL import Image
from prometheus_client import CollectorRegistry
from tiny_layout import spectral_adapter, tiny_rows
from torch import nn

from hueshift.engines.conditioning import Conditioner, Conditioning, CrossInputs
from hueshift.engines.mixes import make_mix
from hueshift.engines.residency_host import HostCache
from hueshift.engines.vae import VaeStage
from hueshift.server.clock import SystemClock
from hueshift.server.event_stream import EventStream
from hueshift.server.generation import GenerationRequest, InversionRequest, LagRequest, StartRequest
from hueshift.server.metrics import Metrics
from hueshift.server.phases import begin_picture, end_phase
from hueshift.server.preparation import Preparation, Prepared
from hueshift.server.residency_metrics import ResidencyMetrics
from hueshift.server.services import ServingParts, _row_cache
from hueshift.server.settings import load_settings
from hueshift.server.ticket import Phase, Ticket


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """A GPU without memory."""
    with fake_gpu() as made:
        yield made


class FarConditioner(FakeConditioner):
    """Hands keys and values over on the GPU, as the real one does from a lane of its own."""

    def condition(self, prompts: Sequence[str], *args: Any, **given: Any) -> Conditioning:
        """As on the host, but there."""
        made = super().condition(prompts, *args, **given)
        stages = tuple(torch.zeros(stage.shape, device=GPU) for stage in made.cross.stages)
        return Conditioning(CrossInputs(stages), made.truncated, made.prompts)


def grey_start(inversion: InversionRequest | None = None) -> StartRequest:
    """A grey picture to start from."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 150)).save(file, "PNG")
    return StartRequest(file.getvalue(), 1.0, inversion)


def prepare(bench: Bench, request: GenerationRequest) -> Prepared:
    """Prepare a request on the GPU."""
    conditioner, vae = cast(Conditioner, FarConditioner()), cast(VaeStage, FakeVae())
    preparation = Preparation(conditioner, vae, bench.slots, tiny_base().schedule, SystemClock(), 8)
    return preparation.prepare(request, request.mixes)


def test_what_a_request_brings_goes_over_without_a_stop(gpu: FakeGpu) -> None:
    bench = Bench()
    request = bench.request(
        adapters={"fox-1.0": 1.0},
        lag=LagRequest(),
        prompt="a fox animal",
        regions=(bench.region(),),
        start=grey_start(),
    )
    prepared = prepare(bench, request)
    assert prepared.lag is not None
    assert prepared.start is not None
    assert {prepared.lag.device, prepared.regions[0].mask.device, prepared.start.clean.device} == {GPU}
    assert gpu.waits == []


def test_rows_are_page_locked_whatever_engine_serves_on_the_gpu(gpu: FakeGpu) -> None:
    rows, factors, norms = tiny_rows()
    log = ResidencyMetrics(Metrics(CollectorRegistry()))
    host = HostCache(lambda key: spectral_adapter(float(key)), 1 << 20, log)
    for device, pinned in (("cpu", False), ("cuda:0", True)):
        base = replace(tiny_base(), unet=nn.Linear(1, 1, device=device))
        cache = _row_cache(load_settings(), ServingParts(base, FakeEngine(), rows, factors, norms), host, log)
        row = cache.get(make_mix([("2", 1.0)])).row
        assert row.spectral is not None
        assert gpu._is_pinned(row.spectral) == pinned


async def test_the_error_of_an_inversion_is_read_with_the_last_picture(gpu: FakeGpu) -> None:
    bench = Bench()
    request = bench.request(start=grey_start(InversionRequest(2, report_error=True)))
    prepared = prepare(bench, request)
    ticket = Ticket(request, EventStream(), size=(8, 8), work=1.0, accepted=0.0)
    running = begin_picture(tiny_base(), ticket, prepared, 0, [0], None, 0.0)
    for phase in (Phase.INVERSION, Phase.RETURN):
        assert running.phase is phase
        assert not end_phase(running, 1.0)
    assert ticket.inversion_error is not None
    assert ticket.inversion_error.device == GPU
    assert gpu.waits == []
