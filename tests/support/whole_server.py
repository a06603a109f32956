"""A whole server in this event loop: real services, stores and scheduler over an engine of the test's choice."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from fake_engine import FakeEngine
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import EngineRow
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.server.addresses import Addresses
from hueshift.server.clock import SystemClock
from hueshift.server.frame import Frame
from hueshift.server.services import ServiceSet, ServingParts
from hueshift.server.settings import Settings, load_settings
from hueshift.server.store.keys import KeyStore
from hueshift.server.store.stores import Stores, open_stores
from hueshift.v1 import adapters_pb2 as adapters_pb
from hueshift.v1 import adapters_pb2_grpc, finetune_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from hueshift.v1 import generation_pb2 as generation_pb


class BoundedFakeEngine(FakeEngine):
    """The fake engine with marks between -1 and 1: rows of a real layout sum to thousands, which tanh would hide."""

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Keep a bounded mark."""
        super().load_row(slot, row)
        self.marks[slot] = math.sin(self.marks[slot])


def fake_parts(base: BaseModel, engine: FakeEngine | None = None) -> ServingParts:
    """A fake engine for a real base model; its singular values are all one."""
    sigma = {layer.name: torch.ones(layer.rank) for layer in base.layout.matrices}
    factors = SpectralFactors(u={}, sigma=sigma, vh={})
    norms = {layer.name: torch.ones(layer.size) for layer in base.layout.norms}
    return ServingParts(base, engine or BoundedFakeEngine(), RowLayout(base.layout, ("proj_out",), 16), factors, norms)


def norm_adapter(base: BaseModel, mark: float) -> Adapter:
    """An adapter that shifts one norm's weights by `mark`."""
    layer = base.layout.norms[0]
    return Adapter(
        AdapterKind.SPECTRAL, base.layout.base_hash, "svdiff", norm={layer.name: torch.full((layer.size,), mark)}
    )


class RpcStubs:
    """The stubs of one caller. `key` is its API key."""

    def __init__(self, channel: grpc.aio.Channel, key: str | None = None) -> None:
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.finetunes: Any = finetune_pb2_grpc.FineTuneServiceStub(channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(channel)
        self.metadata: tuple[tuple[str, str], ...] = (("authorization", f"Bearer {key}"),) if key else ()

    async def import_adapter(self, adapter_id: str, data: bytes) -> adapters_pb.Adapter:
        """Bring an adapter file in."""
        spec = adapters_pb.ImportAdapterSpec(adapter_id=adapter_id, size_bytes=len(data))
        messages = [adapters_pb.ImportAdapterRequest(spec=spec)]
        for begin in range(0, len(data), 1 << 20):
            messages.append(adapters_pb.ImportAdapterRequest(chunk=data[begin : begin + (1 << 20)]))
        answer: adapters_pb.ImportAdapterResponse = await self.adapters.ImportAdapter(
            iter(messages), metadata=self.metadata
        )
        return answer.adapter

    async def generate(self, **fields: Any) -> list[generation_pb.GenerateResponse]:
        """Generate and return every event."""
        request = generation_pb.GenerateRequest(**{"prompt": "a fox", "steps": 2, **fields})
        return [event async for event in self.generation.Generate(request, metadata=self.metadata, timeout=60)]

    async def images(self, **fields: Any) -> list[bytes]:
        """Generate and return the pictures in order."""
        events = await self.generate(**fields)
        images = sorted((event.image for event in events if event.HasField("image")), key=lambda image: image.index)
        return [image.data for image in images]


@dataclass
class LiveServer:
    """A running server."""

    settings: Settings
    stores: Stores
    frame: Frame
    services: ServiceSet
    addresses: Addresses
    exits: AsyncExitStack
    callers: dict[str, RpcStubs] = field(default_factory=dict)

    async def caller(self, tenant: str | None = None) -> RpcStubs:
        """Return stubs with a key of that tenant, or without a key."""
        name = tenant or ""
        if name not in self.callers:
            key = KeyStore(self.stores.database, SystemClock()).create(tenant)[1] if tenant else None
            channel = await self.exits.enter_async_context(grpc.aio.insecure_channel(self.addresses.grpc))
            self.callers[name] = RpcStubs(channel, key)
        return self.callers[name]


@asynccontextmanager
async def live_server(folder: Path, parts: ServingParts, **sections: dict[str, Any]) -> AsyncIterator[LiveServer]:
    """Run a server without workers on free loopback ports; `sections` are settings."""
    sections["server"] = {"port": 0, "metrics_port": 0, "drain_seconds": 5, **sections.get("server", {})}
    sections["training"] = {"workers": 0, **sections.get("training", {})}
    settings = load_settings(None, store={"path": folder / "store", "cache_path": folder / "cache"}, **sections)
    clock = SystemClock()
    stores = open_stores(settings, clock)
    frame = Frame(settings, stores, clock)
    async with AsyncExitStack() as exits:
        try:
            addresses = await frame.start()
            services = ServiceSet(settings, stores, frame.metrics, clock, parts)
            await frame.open(services)
            yield LiveServer(settings, stores, frame, services, addresses, exits)
        finally:
            await frame.close(settings.server.drain_seconds)
            stores.close()


def adapter_file(base: BaseModel, mark: float) -> bytes:
    """The file of `norm_adapter`."""
    return write_adapter(norm_adapter(base, mark))


@dataclass
class Refusal:
    """What a failed call told."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    fields: list[str]
    retry_seconds: float | None
    resource: str


def refusal(error: Any) -> Refusal:
    """Read the status details of a failed call; every failure of ours has an ErrorInfo."""
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info, bad, retry, resource = ErrorInfo(), BadRequest(), RetryInfo(), ResourceInfo()

    def find(wanted: Message) -> bool:
        return any(detail.Unpack(wanted) for detail in status.details)

    assert find(info)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    find(bad)
    find(resource)
    retry_seconds = retry.retry_delay.ToMilliseconds() / 1000 if find(retry) else None
    fields: Sequence[str] = [violation.field for violation in bad.field_violations]
    return Refusal(
        error.code(),
        status.message,
        info.reason,
        dict(info.metadata),
        list(fields),
        retry_seconds,
        resource.resource_name,
    )
