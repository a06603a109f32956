"""A front end before toy replicas: what passes through, where calls go, and what happens when a replica is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from whole_server import RpcStubs, refusal

from hueshift.adapters.errors import Reason, ResourceExhausted
from hueshift.server.clock import SystemClock
from hueshift.server.cluster.build import build_front_end
from hueshift.server.frame import Frame
from hueshift.server.rpc.call import current_call
from hueshift.server.rpc.handlers import ServiceTable
from hueshift.server.settings import load_settings
from hueshift.server.store.database import Database
from hueshift.server.store.keys import KeyStore
from hueshift.server.store.replicas import ReplicaRecord, ReplicaStore
from hueshift.server.store.stores import Stores, open_stores
from hueshift.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2_grpc
from hueshift.v1 import generation_pb2 as pb

HEARTBEAT = 0.1


@dataclass
class ToyReplica(generation_pb2_grpc.GenerationServiceServicer, adapters_pb2_grpc.AdapterServiceServicer):
    """A replica without a model: notes what reaches it and answers by the prompt."""

    name: str
    seen: list[str] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    running: int = 0
    frame: Frame | None = None
    address: str = ""

    def register(self, table: ServiceTable) -> None:
        registrar: Any = table
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, registrar)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, registrar)

    async def start(self) -> None:
        """Nothing to start."""

    async def stop_workers(self, grace: float) -> None:
        """Nothing to stop."""

    async def close(self) -> None:
        """Nothing to close."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        call = current_call()
        self.seen.append(f"{call.tenant} {call.request_id}")
        self.deadlines.append(context.time_remaining())
        self.running += 1
        try:
            if request.prompt == "refuse":
                raise ResourceExhausted(Reason.QUEUE_FULL, "full up", retry_after=7.0)
            if request.prompt == "hang silently":
                await asyncio.sleep(60)
            yield pb.GenerateResponse(queued=pb.Queued(position=0, request_id=call.request_id))
            if request.prompt == "hang":
                await asyncio.sleep(60)
            for index in range(request.count):
                yield pb.GenerateResponse(image=pb.Image(index=index, data=self.name.encode()))
            yield pb.GenerateResponse(finished=pb.Finished(images=request.count))
        finally:
            self.running -= 1

    async def ImportAdapter(self, request_iterator: AsyncIterator[Any], context: Any) -> Any:
        self.uploads.append(0)
        async for message in request_iterator:
            if message.HasField("spec") and message.spec.adapter_id == "refused":
                raise ResourceExhausted(Reason.STORE_FULL, "no room")
            self.uploads[-1] += len(message.chunk)
        return adapters_pb2.ImportAdapterResponse(adapter=adapters_pb2.Adapter(name=self.name))

    async def WarmAdapter(self, request: Any, context: Any) -> Any:
        return adapters_pb2.WarmAdapterResponse(adapter=adapters_pb2.Adapter(name=self.name))


class House:
    """Toy replicas and one front end, all servers with real frames on one database."""

    def __init__(self, folder: Path, exits: AsyncExitStack) -> None:
        self.folder = folder
        self.exits = exits
        self.replicas: dict[str, ToyReplica] = {}
        self.ids: dict[str, str] = {}
        database = Database(folder / "hueshift.db", SystemClock())
        exits.callback(database.close)
        self.table = ReplicaStore(database)
        self.key = KeyStore(database, SystemClock()).create("acme")[1]

    def frame(self, role: str) -> tuple[Frame, Stores]:
        settings = load_settings(
            None,
            store={"path": self.folder},
            server={"port": 0, "metrics_port": 0, "drain_seconds": 0},
            cluster={"role": role, "heartbeat_seconds": HEARTBEAT},
        )
        self.settings = settings
        stores = open_stores(settings, SystemClock())
        frame = Frame(settings, stores, SystemClock())
        self.exits.callback(stores.close)
        self.exits.push_async_callback(frame.close, 0.0)
        return frame, stores

    async def add(self, name: str, seconds: float = 1000.0) -> ToyReplica:
        """Start a replica that says it lives for `seconds`."""
        replica = self.replicas[name] = ToyReplica(name)  # type: ignore[abstract]  # the rest is UNIMPLEMENTED
        replica.frame, _ = self.frame("replica")
        replica.address = (await replica.frame.start()).grpc
        await replica.frame.open(replica)
        self.announce(name, seconds)
        return replica

    def announce(self, name: str, seconds: float) -> None:
        self.table.announce(ReplicaRecord(f"replica-{name}", self.replicas[name].address), seconds)

    async def open(self) -> RpcStubs:
        """Start the front end and return stubs with a key."""
        self.front, stores = self.frame("frontend")
        address = (await self.front.start()).grpc
        await self.front.open(
            build_front_end(self.settings, stores, self.front.metrics, SystemClock(), lambda *_: None)
        )
        self.channel = await self.exits.enter_async_context(grpc.aio.insecure_channel(address))
        return RpcStubs(self.channel, self.key)

    def routed(self, outcome: str) -> float:
        return self.front.metrics.registry.get_sample_value("hueshift_routed_total", {"outcome": outcome}) or 0


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with AsyncExitStack() as exits:
        yield House(tmp_path, exits)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (the condition is a server's)
            await asyncio.sleep(0.01)


def use(*adapters: str) -> list[pb.AdapterUse]:
    return [pb.AdapterUse(adapter=adapter) for adapter in adapters]


async def test_a_call_passes_through_with_all_it_carries(house: House) -> None:
    replica = await house.add("a")
    caller = await house.open()
    metadata = (*caller.metadata, ("x-request-id", "request-12345"))
    request = pb.GenerateRequest(prompt="a fox", count=2)
    call = caller.generation.Generate(request, metadata=metadata, timeout=30)
    kinds = [event.WhichOneof("event") async for event in call]
    assert kinds == ["queued", "image", "image", "finished"]
    assert replica.seen == ["acme request-12345"]
    assert replica.deadlines[0] is not None
    # gRPC rounds a timeout up to what its header can say: 30.1 s were seen for 30.
    assert 20 < replica.deadlines[0] <= 31
    assert dict(await call.trailing_metadata())["x-request-id"] == "request-12345"


async def test_errors_pass_through_with_their_details(house: House) -> None:
    await house.add("a")
    caller = await house.open()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.generate(prompt="refuse")
    told = refusal(caught.value)
    assert (told.code, told.reason, told.message, told.retry_seconds) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        "full up",
        7.0,
    )
    # What the replica does not know at all.
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="x"), metadata=caller.metadata)
    assert refusal(caught.value).code is grpc.StatusCode.UNIMPLEMENTED
    # And strangers do not get as far as a replica.
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await RpcStubs(house.channel).generate()
    assert refusal(caught.value).reason == "CREDENTIAL_MISSING"


async def test_cancellation_and_deadline_reach_the_replica(house: House) -> None:
    replica = await house.add("a")
    caller = await house.open()
    call = caller.generation.Generate(pb.GenerateRequest(prompt="hang"), metadata=caller.metadata)
    assert (await call.read()).HasField("queued")
    assert replica.running == 1
    call.cancel()
    await until(lambda: replica.running == 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.generation.Generate(
            pb.GenerateRequest(prompt="hang silently"), metadata=caller.metadata, timeout=0.5
        ).read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: replica.running == 0)


async def test_uploads_stream_through_and_a_refusal_ends_them(house: House) -> None:
    replica = await house.add("a")
    caller = await house.open()
    assert (await caller.import_adapter("fox", b"x" * 3_500_000)).name == "a"
    assert replica.uploads == [3_500_000]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.import_adapter("refused", b"x" * 8_000_000)
    assert refusal(caught.value).reason == "STORE_FULL"


async def test_the_same_adapters_go_to_the_same_replica(house: House) -> None:
    for name in "abc":
        await house.add(name)
    caller = await house.open()
    where: dict[int, set[bytes]] = {}
    for _ in range(3):
        for n in range(12):
            (drawn,) = await caller.images(adapters=use(f"adapter-{n}", "other"), count=1)
            where.setdefault(n, set()).add(drawn)
            (drawn,) = await caller.images(adapters=use("tenants/acme/adapters/other", f"adapter-{n}"), count=1)
            where[n].add(drawn)
    assert all(len(found) == 1 for found in where.values())
    assert set.union(*where.values()) == {b"a", b"b", b"c"}
    assert house.routed("affine") == 72
    warm = adapters_pb2.WarmAdapterRequest(name="solo")
    warmed = (await caller.adapters.WarmAdapter(warm, metadata=caller.metadata)).adapter.name
    assert await caller.images(adapters=use("solo"), count=1) == [warmed.encode()]


async def test_a_busy_replica_is_passed_by(house: House) -> None:
    for name in "ab":
        await house.add(name)
    caller = await house.open()
    request = pb.GenerateRequest(prompt="hang", adapters=use("loved"), count=4)
    calls = [caller.generation.Generate(request, metadata=caller.metadata) for _ in range(2)]
    for call in calls:
        assert (await call.read()).HasField("queued")
    assert [replica.running for replica in house.replicas.values()] == [1, 1]
    assert (house.routed("affine"), house.routed("spread")) == (1, 1)
    for call in calls:
        call.cancel()


async def test_a_dead_replica_is_skipped_and_the_call_retried(house: House) -> None:
    for name in "ab":
        await house.add(name)
    caller = await house.open()
    (drawn,) = await caller.images(adapters=use("fox"), count=1)
    dead, other = (house.replicas[name] for name in (drawn.decode(), "a" if drawn == b"b" else "b"))
    assert dead.frame is not None
    await dead.frame.close(0.0)
    # Its row still says that it lives.
    assert await caller.images(adapters=use("fox"), count=1) == [other.name.encode()]
    assert house.routed("retried") == 1
    assert await caller.images(adapters=use("fox"), count=1) == [other.name.encode()]
    assert house.routed("retried") == 1


async def test_a_silent_replica_has_its_calls_moved_or_ended(house: House) -> None:
    silent = await house.add("a", seconds=1.0)
    caller = await house.open()
    waiting = asyncio.create_task(caller.generate(prompt="hang silently"))
    begun = caller.generation.Generate(pb.GenerateRequest(prompt="hang"), metadata=caller.metadata)
    assert (await begun.read()).HasField("queued")
    await until(lambda: silent.running == 2)
    other = await house.add("b")
    # The one that has heard nothing moves on; the other is told to try again.
    await until(lambda: other.running == 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await begun.read()
    assert (refusal(caught.value).reason, refusal(caught.value).metadata["retryable"]) == ("NO_REPLICA", "true")
    waiting.cancel()
    await until(lambda: other.running == 0)
    await until(lambda: silent.running == 0)


async def test_a_replica_that_withdraws_finishes_its_calls(house: House) -> None:
    replica = await house.add("a")
    caller = await house.open()
    call = caller.generation.Generate(pb.GenerateRequest(prompt="hang"), metadata=caller.metadata)
    assert (await call.read()).HasField("queued")
    house.table.withdraw("replica-a")
    await until(lambda: house.front.metrics.registry.get_sample_value("hueshift_replicas") == 0)
    await asyncio.sleep(2 * HEARTBEAT)
    assert replica.running == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.generate()
    told = refusal(caught.value)
    assert (told.code, told.reason, told.retry_seconds) == (grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", 1.0)
    call.cancel()
