"""Generate over gRPC: the stream, its errors and details, cancellation, deadlines, quotas, and what is kept private."""

import asyncio
import hashlib
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from PIL import Image
from structlog.testing import capture_logs
from whole_server import BoundedFakeEngine, LiveServer, RpcStubs, adapter_file, fake_parts, live_server, refusal

from hueshift.engines.base_model import BaseModel
from hueshift.v1 import adapters_pb2, model_pb2
from hueshift.v1 import generation_pb2 as pb

IDLE = {"live": 0, "waiting": 0, "active": 0, "rows": 0, "preparing": 0, "decoding": 0, "slot_uses": 0}


class Valve:
    """Holds the engine's calls until opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.calls = 0

    def __call__(self, _plan: object, _slots: object) -> None:
        self.calls += 1
        self.open.wait(20)


@pytest_asyncio.fixture
async def live(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[LiveServer]:
    async with live_server(tmp_path, fake_parts(base_model)) as server:
        yield server


def counts(server: LiveServer) -> dict[str, int]:
    snapshot = server.services.scheduler.snapshot()
    return {name: getattr(snapshot, name) for name in IDLE}


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("the condition did not come true within 5 s")


async def fails(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


async def test_the_stream_of_a_call(live: LiveServer, base_model: BaseModel) -> None:
    caller = await live.caller("acme")
    imported = await caller.import_adapter("fox", adapter_file(base_model, 0.5))
    events = await caller.generate(
        adapters=[pb.AdapterUse(adapter="fox", weight=0.5)],
        count=2,
        seeds=[2**64 - 1],
        steps=3,
        preview_interval=1,
        format=pb.IMAGE_FORMAT_WEBP,
    )
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "queued"
    assert kinds[-1] == "finished"
    assert {"progress", "image"} <= set(kinds)
    assert events[0].queued.request_id == events[-1].finished.request_id != ""
    progress = [(event.progress.step, event.progress.of) for event in events if event.HasField("progress")]
    assert progress == sorted(progress)
    assert progress[-1][1] == 6
    images = {event.image.index: event.image for event in events if event.HasField("image")}
    assert [images[i].seed for i in (0, 1)] == [2**64 - 1, 0]
    assert events[-1].finished.images == 2
    image = images[0]
    assert Image.open(BytesIO(image.data)).size == (image.width, image.height) == (128, 128)
    assert (image.media_type, image.engine, list(image.plans)) == ("image/webp", "fake", ["factored"])
    assert image.base_hash == base_model.base_hash
    applied = image.adapters[0]
    assert (applied.adapter, applied.revision, applied.weight) == ("tenants/acme/adapters/fox", 1, 0.5)
    assert applied.content_hash == imported.content_hash == hashlib.sha256(adapter_file(base_model, 0.5)).hexdigest()
    assert image.timings.denoise.ToNanoseconds() > 0
    assert events[-1].finished.total.ToNanoseconds() >= image.timings.denoise.ToNanoseconds()


async def test_seeds_adapters_and_weights_decide_the_picture(live: LiveServer, base_model: BaseModel) -> None:
    caller = await live.caller("acme")
    for name, mark in (("one", 0.5), ("two", -0.5)):
        await caller.import_adapter(name, adapter_file(base_model, mark))
    base = await caller.images(seeds=[7])
    assert await caller.images(seeds=[7]) == base
    assert await caller.images(seeds=[7], adapters=[pb.AdapterUse(adapter="one", weight=0)]) == base
    one, two = [await caller.images(seeds=[7], adapters=[pb.AdapterUse(adapter=name)]) for name in ("one", "two")]
    assert len({base[0], one[0], two[0]}) == 3
    assert (await caller.images(seeds=[8])) != base


async def test_wrong_fields_come_back_with_their_paths(live: LiveServer) -> None:
    caller = await live.caller("acme")
    told = await fails(caller.generate(prompt="", steps=-1, adapters=[pb.AdapterUse(adapter="A B", weight=9)]))
    assert told.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (told.reason, told.metadata["retryable"]) == ("INVALID_FIELD", "false")
    assert set(told.fields) == {"prompt", "steps", "adapters[0].weight", "adapters[0].adapter"}


async def test_missing_adapters_and_revisions(live: LiveServer, base_model: BaseModel) -> None:
    caller = await live.caller("acme")
    told = await fails(caller.generate(adapters=[pb.AdapterUse(adapter="ghost")]))
    assert (told.code, told.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert told.resource == "tenants/acme/adapters/ghost"
    await caller.import_adapter("fox", adapter_file(base_model, 0.5))
    told = await fails(caller.generate(adapters=[pb.AdapterUse(adapter="fox", revision=2)]))
    assert (told.code, told.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_REVISION_NOT_FOUND")


async def test_a_deleted_adapter_stops_at_once(base_model: BaseModel, tmp_path: Path) -> None:
    valve = Valve()
    async with live_server(tmp_path, fake_parts(base_model, BoundedFakeEngine(on_call=valve))) as live:
        caller = await live.caller("acme")
        await caller.import_adapter("fox", adapter_file(base_model, 0.5))
        use = [pb.AdapterUse(adapter="fox")]
        running = asyncio.create_task(caller.generate(adapters=use, steps=50))
        await until(lambda: valve.calls > 0)
        await caller.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="fox"), metadata=caller.metadata)
        valve.open.set()
        told = await fails(running)
        assert (told.code, told.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_DELETED")
        assert (await fails(caller.generate(adapters=use))).reason == "ADAPTER_NOT_FOUND"


async def test_a_cancelled_call_frees_its_places(base_model: BaseModel, tmp_path: Path) -> None:
    valve = Valve()
    async with live_server(tmp_path, fake_parts(base_model, BoundedFakeEngine(on_call=valve))) as live:
        caller = await live.caller("acme")
        await caller.import_adapter("fox", adapter_file(base_model, 0.5))
        request = pb.GenerateRequest(prompt="a fox", steps=100, count=8, adapters=[pb.AdapterUse(adapter="fox")])
        call = caller.generation.Generate(request, metadata=caller.metadata)
        assert (await call.read()).HasField("queued")
        await until(lambda: valve.calls > 0)
        assert counts(live)["active"] == 4
        call.cancel()
        await until(lambda: live.frame.gate.inside == 0)
        valve.open.set()
        await until(lambda: counts(live) == IDLE)
        # The step that ran when the call was cancelled was the last one.
        assert valve.calls <= 2


async def test_deadlines_hold_inside_the_denoising(base_model: BaseModel, tmp_path: Path) -> None:
    def slow(_plan: object, _slots: object) -> None:
        threading.Event().wait(0.02)

    engine = BoundedFakeEngine(on_call=slow)
    async with live_server(tmp_path, fake_parts(base_model, engine), server={"default_deadline_seconds": 0.8}) as live:
        caller = await live.caller("acme")
        # Without a deadline of its own the call gets the server's default, and the server says that it passed.
        call = caller.generation.Generate(pb.GenerateRequest(prompt="a fox", steps=150), metadata=caller.metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        told = refusal(caught.value)
        assert (told.code, told.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED")
        await until(lambda: counts(live) == IDLE)
        calls = len(engine.calls)
        assert 16 <= calls < 60
        # By now the server knows its pace, and refuses at the door what cannot end in time.
        told = await fails(
            caller.generation.Generate(pb.GenerateRequest(prompt="a", steps=150), metadata=caller.metadata).read()
        )
        assert (told.code, told.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT")
        assert len(engine.calls) == calls


async def test_full_queues_say_when_to_come_back(base_model: BaseModel, tmp_path: Path) -> None:
    valve = Valve()
    parts = fake_parts(base_model, BoundedFakeEngine(on_call=valve))
    async with live_server(tmp_path, parts, limits={"queue_size": 24, "tenant_queue_size": 16}) as live:
        greedy, other = await live.caller("greedy"), await live.caller("other")
        calls = [asyncio.create_task(greedy.generate(count=10, width=32, height=32))]
        await until(lambda: counts(live)["active"] > 0)
        calls.append(asyncio.create_task(greedy.generate(count=10, width=32, height=32)))
        await until(lambda: counts(live)["waiting"] == 16)
        told = await fails(greedy.generate())
        assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_QUOTA")
        assert told.metadata["retryable"] == "true"
        assert told.retry_seconds is not None
        assert told.retry_seconds > 0
        calls.append(asyncio.create_task(other.generate(count=8, width=32, height=32)))
        await until(lambda: counts(live)["waiting"] == 24)
        told = await fails(other.generate())
        assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        valve.open.set()
        finished = await asyncio.gather(*calls)
        assert [events[-1].finished.images for events in finished] == [10, 10, 8]


async def test_an_engine_failure_is_an_incident_of_those_requests_only(base_model: BaseModel, tmp_path: Path) -> None:
    broken = threading.Event()

    def on_call(_plan: object, _slots: object) -> None:
        if broken.is_set():
            raise RuntimeError("swordfish in the engine")

    async with live_server(tmp_path, fake_parts(base_model, BoundedFakeEngine(on_call=on_call))) as live:
        caller = await live.caller("acme")
        before = await caller.images(seeds=[1])
        broken.set()
        told = await fails(caller.generate())
        assert (told.code, told.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert told.metadata["incident"] in told.message
        assert "swordfish" not in told.message
        broken.clear()
        assert await caller.images(seeds=[1]) == before
        await until(lambda: counts(live) == IDLE)


async def test_a_drain_finishes_accepted_requests(base_model: BaseModel, tmp_path: Path) -> None:
    valve = Valve()
    async with live_server(tmp_path, fake_parts(base_model, BoundedFakeEngine(on_call=valve))) as live:
        caller = await live.caller("acme")
        calls = [asyncio.create_task(caller.generate(count=2, width=32, height=32)) for _ in range(10)]
        await until(lambda: live.frame.gate.inside == 10 and valve.calls > 0)
        closing = asyncio.create_task(live.frame.close(20))
        await asyncio.sleep(0.05)
        told = await fails(caller.generate())
        assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        valve.open.set()
        finished = await asyncio.gather(*calls)
        assert all(events[-1].finished.images == 2 for events in finished)
        assert await closing == 0


async def test_neither_prompts_nor_tenants_reach_metrics_or_logs(live: LiveServer, base_model: BaseModel) -> None:
    with capture_logs() as logs:
        caller = await live.caller("secretive-tenant")
        await caller.import_adapter("hidden-adapter", adapter_file(base_model, 0.5))
        await caller.generate(prompt="a zebra in the rain", negative_prompt="umbrella")
        await fails(caller.generate(prompt="a zebra", adapters=[pb.AdapterUse(adapter="unseen")], steps=-3))
        await fails(caller.generate(prompt="a zebra", adapters=[pb.AdapterUse(adapter="unseen")]))

    def fetch() -> str:
        with urllib.request.urlopen(live.addresses.metrics, timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    page = await asyncio.to_thread(fetch)
    told = "\n".join(str({key: value for key, value in line.items() if key != "tenant_hash"}) for line in logs)
    assert any(line["event"] == "call ended" for line in logs)
    for word in ("zebra", "umbrella", "secretive-tenant", "hidden-adapter", "unseen"):
        assert word not in page
        assert word not in told
    method = "hueshift.v1.GenerationService/Generate"
    for code, count in (("OK", 1), ("INVALID_ARGUMENT", 1), ("NOT_FOUND", 1)):
        assert f'hueshift_requests_total{{code="{code}",method="{method}"}} {count}.0' in page
    assert "hueshift_images_total 1.0" in page
    assert 'hueshift_batch_rows_count{plan="dense"} 2.0' in page


async def test_the_model_describes_the_server(live: LiveServer, base_model: BaseModel) -> None:
    caller = await live.caller()
    model = (await caller.models.GetModel(model_pb2.GetModelRequest())).model
    assert model.name == f"models/{base_model.name}"
    assert model.base_hash == base_model.base_hash
    assert (model.width, model.size_multiple, model.max_count) == (128, base_model.size_multiple, 16)
    assert model.default_sampler == pb.SAMPLER_DPMPP_2M
    assert len(model.samplers) == 4
    assert {method.method for method in model.methods} == set(range(1, 7))
    assert all(method.subject_defaults.steps > 0 and method.style_defaults.steps > 0 for method in model.methods)
    page = await caller.models.ListModels(model_pb2.ListModelsRequest())
    assert [found.name for found in page.models] == [model.name]
    for name in (model.name, base_model.name):
        assert (await caller.models.GetModel(model_pb2.GetModelRequest(name=name))).model == model
    told = await fails(caller.models.GetModel(model_pb2.GetModelRequest(name="models/other")))
    assert (told.code, told.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert (await fails(caller.models.ListModels(model_pb2.ListModelsRequest(page_token="x")))).reason == (
        "PAGE_TOKEN_INVALID"
    )
    assert isinstance(caller, RpcStubs)
