"""Every field of every request, wrong one at a time, with all others right: no answer is INTERNAL or UNKNOWN.

The methods and fields come from reflection, so a new one is asked the same without a line here. `test_fuzz.py` sends
messages that are wrong in many places, which mostly end at the first check; these get through to the last.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from whole_server import LiveServer, adapter_file, fake_parts, live_server

from hueshift.engines.base_model import BaseModel
from hueshift.server.rpc.crowding import MAX_VALUES
from hueshift.v1 import adapters_pb2 as adapters_pb
from hueshift.v1 import finetune_pb2 as finetune_pb
from hueshift.v1 import generation_pb2 as generation_pb
from hueshift.v1 import model_pb2 as model_pb

AT_ONCE, SECONDS = 16, 20
# A watch stays open while its job waits: half a second is enough to be refused.
WATCH, WATCH_SECONDS = "FineTuneService/WatchFineTune", 0.5
GENERATE = "GenerationService/Generate"
BAD = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.CANCELLED)

_TEXTS = ("", "\x00", "a\x00b", "x" * 20_000, "\x1b[31m\x7f", "\u202eabc", "\U0010ffff", "../../etc/passwd")
_NAMES = ("tenants/rival/adapters/fox", "tenants/acme/adapters/../fox", "fox\x00", "%s{0}", "'; DROP TABLE adapters;--")
_FLOATS = (0.0, -1.0, 1e-45, 3e38, -3e38, math.nan, math.inf, -math.inf)
_FILES = (b"", b"\x00", b"PK\x03\x04", b"\x80\x04.", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"x" * (2**20 + 1))


@pytest_asyncio.fixture
async def live(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[LiveServer]:
    limits = {"max_steps": 2, "default_steps": 1, "max_count": 2, "max_size": 64, "tenant_queued_jobs": 1000}
    async with live_server(tmp_path, fake_parts(base_model), limits=limits) as server:
        yield server


def good_requests(adapter: bytes) -> dict[str, Message]:
    """A valid request of every method; the first one of an upload."""
    use = generation_pb.AdapterUse(adapter="fox", weight=1, block_weights={"mid_block": 1.0})
    fox = adapters_pb.AdapterRef(adapter="fox")
    spec = adapters_pb.ImportAdapterSpec(
        adapter_id="new", display_name="New", labels={"team": "x"}, size_bytes=len(adapter), rank=4, word="w"
    )
    job = finetune_pb.FineTuneSpec(
        adapter_id="new",
        class_noun="animal",
        labels={"team": "x"},
        settings=finetune_pb.FineTuneSettings(steps=1),
        sample_prompts=["a sks animal"],
        pictures=[finetune_pb.PictureSpec(size_bytes=9, mask_size_bytes=9, caption="a sks animal")],
        validate_only=True,
    )
    return {
        GENERATE: generation_pb.GenerateRequest(
            prompt="a fox",
            adapters=[use],
            seeds=[1],
            steps=1,
            guidance_scale=2,
            sampler=generation_pb.SAMPLER_DDIM,
            eta=0.5,
            width=64,
            height=64,
            regions=[
                generation_pb.Region(adapters=[use], box=generation_pb.Box(width=32, height=32), feather=2),
            ],
        ),
        "AdapterService/ImportAdapter": adapters_pb.ImportAdapterRequest(spec=spec),
        "AdapterService/ExportAdapter": adapters_pb.ExportAdapterRequest(name="fox", revision=1),
        "AdapterService/GetAdapter": adapters_pb.GetAdapterRequest(name="fox"),
        "AdapterService/ListAdapters": adapters_pb.ListAdaptersRequest(page_size=1, labels={"team": "x"}),
        "AdapterService/UpdateAdapter": adapters_pb.UpdateAdapterRequest(
            adapter=adapters_pb.Adapter(name="fox", display_name="Fox", labels={"team": "x"}),
            update_mask=FieldMask(paths=["display_name", "labels"]),
        ),
        "AdapterService/DeleteAdapter": adapters_pb.DeleteAdapterRequest(name="gone"),
        "AdapterService/CombineAdapters": adapters_pb.CombineAdaptersRequest(
            adapter_id="mix",
            labels={"team": "x"},
            interpolation=adapters_pb.AdapterInterpolation(first=fox, second=fox, position=0.5),
        ),
        "AdapterService/WarmAdapter": adapters_pb.WarmAdapterRequest(name="fox", revision=1, pin=False),
        "AdapterService/GetStorage": adapters_pb.GetStorageRequest(),
        "FineTuneService/CreateFineTune": finetune_pb.CreateFineTuneRequest(spec=job),
        "FineTuneService/GetFineTune": finetune_pb.GetFineTuneRequest(name="gone"),
        "FineTuneService/ListFineTunes": finetune_pb.ListFineTunesRequest(
            page_size=1, states=[finetune_pb.FINE_TUNE_STATE_QUEUED]
        ),
        WATCH: finetune_pb.WatchFineTuneRequest(name="gone", after_sequence=1),
        "FineTuneService/CancelFineTune": finetune_pb.CancelFineTuneRequest(name="gone"),
        "FineTuneService/RetryFineTune": finetune_pb.RetryFineTuneRequest(name="gone", idempotency_key="k"),
        "FineTuneService/DeleteFineTune": finetune_pb.DeleteFineTuneRequest(name="gone", idempotency_key="k"),
        "ModelService/GetModel": model_pb.GetModelRequest(name="models/emoji-128"),
        "ModelService/ListModels": model_pb.ListModelsRequest(page_size=1),
    }


def odd_values(field: Any) -> tuple[Any, ...]:
    kinds = FieldDescriptor
    if field.type == kinds.TYPE_STRING:
        return (*_TEXTS, *_NAMES)
    if field.type == kinds.TYPE_BYTES:
        return _FILES
    if field.type == kinds.TYPE_BOOL:
        return (True, False)
    if field.type in (kinds.TYPE_FLOAT, kinds.TYPE_DOUBLE):
        return _FLOATS
    if field.type == kinds.TYPE_UINT64:
        return (0, 2**63, 2**64 - 1)
    if field.type == kinds.TYPE_INT64:
        return (0, -1, -(2**63), 2**63 - 1)
    return (0, -1, 99, -(2**31), 2**31 - 1)


def wrong_requests(request: Message, whole: Message | None = None, path: str = "") -> Iterator[tuple[str, bytes]]:
    """What differs, and the request, once for each field that is missing or odd."""
    whole = request if whole is None else whole
    before = type(request)()
    before.CopyFrom(request)
    for field in request.DESCRIPTOR.fields:
        for what in _change(request, field):
            yield f"{path}{field.name} {what}", whole.SerializeToString()
            request.CopyFrom(before)
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry:
            continue
        if field.is_repeated and len(getattr(request, field.name)):
            yield from wrong_requests(getattr(request, field.name)[0], whole, f"{path}{field.name}[0].")
        elif not field.is_repeated and request.HasField(field.name):
            yield from wrong_requests(getattr(request, field.name), whole, f"{path}{field.name}.")


def _change(request: Message, field: Any) -> Iterator[str]:
    request.ClearField(field.name)
    yield "absent"
    target: Any = getattr(request, field.name)
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        text = inner.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING
        for key in (*_TEXTS, *_NAMES):
            getattr(request, field.name)[key] = "x" if text else 1.0
            yield f"key {key[:30]!r}"
        for value in odd_values(inner.fields_by_name["value"]):
            getattr(request, field.name)["mid_block"] = value
            yield f"value {str(value)[:30]!r}"
    elif inner is not None and field.is_repeated:
        for _ in range(MAX_VALUES // 2):
            target.add()
        yield "many empty"
    elif inner is not None:
        target.SetInParent()
        yield "empty"
    elif field.is_repeated:
        for value in odd_values(field):
            getattr(request, field.name).append(value)
            yield f"{str(value)[:30]!r}"
        getattr(request, field.name).extend([odd_values(field)[-1]] * 500)
        yield "many"
    else:
        for value in odd_values(field):
            setattr(request, field.name, value)
            yield f"{str(value)[:30]!r}"


async def reflected_methods(live: LiveServer) -> dict[str, tuple[str, bool]]:
    """Every method of the server's own services, by reflection: its request's type, and whether it is an upload."""
    async with grpc.aio.insecure_channel(live.addresses.grpc) as channel:
        make: Any = reflection_pb2_grpc.ServerReflectionStub
        stub = make(channel)

        async def ask(**fields: Any) -> Any:
            request = reflection_pb2.ServerReflectionRequest(**fields)
            return await anext(aiter(stub.ServerReflectionInfo(iter([request]))))

        listed = await ask(list_services="")
        found: dict[str, tuple[str, bool]] = {}
        for service in listed.list_services_response.service:
            if not service.name.startswith("hueshift."):
                continue
            files = await ask(file_containing_symbol=service.name)
            for data in files.file_descriptor_response.file_descriptor_proto:
                for described in FileDescriptorProto.FromString(data).service:
                    if service.name.endswith(f".{described.name}"):
                        for method in described.method:
                            name = f"{described.name}/{method.name}"
                            found[name] = (method.input_type.lstrip("."), method.client_streaming)
        return found


@pytest.mark.slow
async def test_no_wrong_field_of_any_method_is_internal(live: LiveServer, base_model: BaseModel) -> None:
    adapter = adapter_file(base_model, 0.5)
    acme, rival = await live.caller("acme"), await live.caller("rival")
    for caller in (acme, rival):
        await caller.import_adapter("fox", adapter)
    before = await rival.images(seeds=[5])
    requests = good_requests(adapter)
    methods = await reflected_methods(live)
    assert {name: kind for name, (kind, _) in methods.items()} == {
        name: request.DESCRIPTOR.full_name for name, request in requests.items()
    }
    chunk = adapters_pb.ImportAdapterRequest(chunk=adapter).SerializeToString()
    codes: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    turns = asyncio.Semaphore(AT_ONCE)
    async with grpc.aio.insecure_channel(live.addresses.grpc) as channel:

        async def call(method: str, what: str, data: bytes) -> None:
            uploads = methods[method][1]
            messages = [data, chunk] if method == "AdapterService/ImportAdapter" else [data]
            open_call: Any = channel.stream_stream if uploads else channel.unary_stream
            async with turns:
                stream = open_call(f"/hueshift.v1.{method}")(
                    iter(messages) if uploads else data,
                    timeout=WATCH_SECONDS if method == WATCH else SECONDS,
                    metadata=acme.metadata,
                )
                try:
                    async for _ in stream:
                        pass
                except grpc.aio.AioRpcError as error:
                    codes[method, error.code().name] += 1
                    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and method != WATCH
                    if error.code() in BAD or late or not error.details():
                        wrong.append(f"{method} {what}: {error.code().name} {error.details()}")
                else:
                    codes[method, "OK"] += 1

        for method, request in requests.items():
            await call(method, "as it should be", request.SerializeToString())
            await asyncio.gather(*(call(method, what, data) for what, data in wrong_requests(request)))
        calls = codes.total()
        # Meanwhile another tenant's picture stayed the same.
        assert await rival.images(seeds=[5]) == before
    assert not wrong, "\n".join(wrong[:20])
    assert calls > 1000
    assert {code for _, code in codes} >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    assert codes[GENERATE, "OK"] > 20
    assert codes["FineTuneService/CreateFineTune", "OK"] > 20
    assert live.frame.metrics.registry.get_sample_value("hueshift_internal_errors_total") == 0
    assert live.frame.gate.inside == 0
    assert live.stores.jobs.open_jobs() == set()
