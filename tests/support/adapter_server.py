"""AdapterService over real gRPC, with the real interceptors, keys of two tenants, and an engine that only remembers."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from prometheus_client import CollectorRegistry
from small_adapters import LAYOUT
from small_store import SmallStore, open_small_store, small_file

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.auth import Authenticator
from hueshift.server.clock import SystemClock
from hueshift.server.metrics import Metrics
from hueshift.server.pins import Mix
from hueshift.server.rpc.adapter_service import AdapterService
from hueshift.server.rpc.gate import Gate
from hueshift.server.rpc.interceptors import make_interceptors
from hueshift.server.settings import LimitSettings, ServerSettings
from hueshift.server.store.keys import KeyStore
from hueshift.v1 import adapters_pb2 as pb
from hueshift.v1 import adapters_pb2_grpc

MIB = 1024 * 1024
DATA = small_file(0)[1]


@dataclass
class FakeResidents:
    """Remembers what the engine would hold."""

    rows: set[str] = field(default_factory=set)
    pins: set[str] = field(default_factory=set)
    dropped: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    refuse: bool = False
    warming: Callable[[], object] = lambda: None

    async def warm(self, mix: Mix, pin: bool | None) -> bool:
        ((content_hash, weight),) = mix
        assert weight == 1.0
        if self.refuse:
            raise InvalidArgument(Reason.ADAPTER_RANK_TOO_LARGE, "too large for this engine")
        await asyncio.to_thread(self.warming)
        loaded = content_hash not in self.rows
        self.rows.add(content_hash)
        if pin is not None:
            (self.pins.add if pin else self.pins.discard)(content_hash)
        return loaded

    def drop_adapter(self, name: str, hashes: Sequence[str]) -> None:
        self.dropped.append((name, tuple(hashes)))
        self.rows -= set(hashes)
        self.pins -= set(hashes)

    def resident(self, content_hash: str) -> bool:
        return content_hash in self.rows


@dataclass
class Running:
    """A server, its store and its engine, and two tenants with keys."""

    store: SmallStore
    residents: FakeResidents
    service: AdapterService
    stub: adapters_pb2_grpc.AdapterServiceStub
    keys: dict[str, str]

    def call(self, method: str, request: Any, tenant: str = "acme") -> Any:
        """Call an RPC as a tenant; a stream is returned as a list."""
        metadata = (("authorization", f"Bearer {self.keys[tenant]}"),)
        answer = getattr(self.stub, method)(request, timeout=20, metadata=metadata)
        return list(answer) if method == "ExportAdapter" else answer

    def import_file(self, data: bytes = DATA, tenant: str = "acme", chunk: int = 200, **spec: Any) -> Any:
        """Import a file in chunks."""
        messages = [import_spec(size_bytes=len(data), **spec)]
        messages += [pb.ImportAdapterRequest(chunk=data[at : at + chunk]) for at in range(0, len(data), chunk)]
        return self.call("ImportAdapter", iter(messages), tenant)

    def refused(self, method: str, request: Any, tenant: str = "acme") -> tuple[str, str, str]:
        """Call an RPC that fails; return its code, reason and message."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, request, tenant)
        return failure_of(caught.value)


def failure_of(error: Any) -> tuple[str, str, str]:
    """Code, reason and message of a failed call."""
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return error.code().name, info.reason, status.message


def import_spec(**values: Any) -> pb.ImportAdapterRequest:
    """The first message of an import."""
    return pb.ImportAdapterRequest(spec=pb.ImportAdapterSpec(**values))


def chunk(data: bytes) -> pb.ImportAdapterRequest:
    """Any other message of an import."""
    return pb.ImportAdapterRequest(chunk=data)


async def _serve(service: AdapterService, keys: KeyStore, ready: Callable[[int, Callable[[], object]], None]) -> None:
    clock, gate, stop = SystemClock(), Gate(()), asyncio.Event()
    interceptors = make_interceptors(
        settings=ServerSettings(),
        metrics=Metrics(CollectorRegistry()),
        authenticator=Authenticator(keys, clock, default_tenant="local", required=True),
        gate=gate,
        clock=clock,
        label=lambda method: method,
    )
    server = grpc.aio.server(interceptors=interceptors)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gate.open()
    loop = asyncio.get_running_loop()
    ready(port, lambda: loop.call_soon_threadsafe(stop.set))
    await stop.wait()
    await server.stop(None)


@contextmanager
def serve_adapters(folder: Path) -> Iterator[Running]:
    """Serve the store in `folder`; at the end rows and files must agree, and no temporary file may be left."""
    store, residents = open_small_store(folder), FakeResidents()
    key_store = KeyStore(store.database, store.clock)
    keys = {tenant: key_store.create(tenant)[1] for tenant in ("acme", "other")}
    service = AdapterService(store.adapters, LAYOUT, LimitSettings(max_adapter_bytes=3 * MIB), residents, SystemClock())
    started, places = threading.Event(), list[tuple[int, Callable[[], object]]]()

    def ready(port: int, stop: Callable[[], object]) -> None:
        places.append((port, stop))
        started.set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: asyncio.run(_serve(service, key_store, ready)))
        assert started.wait(20)
        port, stop = places[0]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Running(store, residents, service, adapters_pb2_grpc.AdapterServiceStub(channel), keys)
        stop()
        future.result(20)
    store.check()
    assert store.temporaries() == []
    store.database.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait up to five seconds for a condition."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never came true")
