"""The life of a server: the port before the model, health, warm-up, drain, and what stands in its way."""

import asyncio
import gc
import os
import socket
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.addresses import Addresses
from hueshift.server.clock import Clock, SystemClock
from hueshift.server.metrics import Metrics
from hueshift.server.rpc.contract import SERVICES
from hueshift.server.rpc.handlers import ServiceTable
from hueshift.server.serve import Progress, StopRequest, serve
from hueshift.server.settings import Settings, load_settings
from hueshift.server.store.database import Database
from hueshift.server.store.keys import KeyStore
from hueshift.server.store.replicas import ReplicaStore
from hueshift.server.store.stores import Stores
from hueshift.v1 import generation_pb2 as pb
from hueshift.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


class ToyGeneration(generation_pb2_grpc.GenerationServiceServicer):
    """Answers Queued at once and Finished when released."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(queued=pb.Queued(position=0))
        await self.release.wait()
        yield pb.GenerateResponse(finished=pb.Finished(images=1))


@dataclass
class ToyServices:
    """Services without a model, telling what was done to them."""

    generation: ToyGeneration
    done: list[str] = field(default_factory=list)

    def register(self, table: ServiceTable) -> None:
        registrar: Any = table
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self.generation, registrar)

    async def start(self) -> None:
        self.done.append("start")

    async def stop_workers(self, grace: float) -> None:
        self.done.append(f"stop_workers {grace:g}")

    async def close(self) -> None:
        self.done.append("close")


@dataclass
class Running:
    """A server in this event loop."""

    settings: Settings
    services: ToyServices
    stop: StopRequest
    built: threading.Event
    """Set to let the warm-up end."""
    fail: Exception | None = None
    task: "asyncio.Task[None] | None" = None
    ready: "asyncio.Future[Addresses] | None" = None

    def build(
        self, _settings: Settings, _stores: Stores, _metrics: Metrics, _clock: Clock, progress: Progress
    ) -> ToyServices:
        progress("warm-up", 1, 2)
        self.built.wait(20)
        if self.fail is not None:
            raise self.fail
        return self.services

    def run(self) -> "asyncio.Task[None]":
        self.ready = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(
            serve(self.settings, ready=self.ready.set_result, stop=self.stop, build=self.build)
        )
        return self.task


def toy_settings(folder: Path, **server: Any) -> Settings:
    return load_settings(
        server={"port": 0, "metrics_port": 0, "drain_seconds": 5, **server}, store={"path": folder / "store"}
    )


@asynccontextmanager
async def running(settings: Settings, *, warm: bool = True) -> AsyncIterator[tuple[Running, Addresses]]:
    """Run a toy server; stop it at the end."""
    server = Running(settings, ToyServices(ToyGeneration()), StopRequest(), threading.Event())
    server.built.set()
    task = server.run()
    assert server.ready is not None
    either: set[asyncio.Future[Any]] = {task, server.ready}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield server, await server.ready
    finally:
        server.stop.ask()
        server.stop.ask()
        await task


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def check(channel: grpc.aio.Channel, service: str = "") -> int:
    answer: health_pb2.HealthCheckResponse = await health(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return answer.status


def health(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def reflection(channel: Any) -> Any:
    return reflection_pb2_grpc.ServerReflectionStub(channel)


def generate(channel: grpc.aio.Channel) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("the condition did not come true within 5 s")


async def test_the_port_opens_before_the_model_is_loaded(tmp_path: Path) -> None:
    port = free_port()
    server = Running(toy_settings(tmp_path, port=port), ToyServices(ToyGeneration()), StopRequest(), threading.Event())
    task = server.run()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
        for service in ("", *SERVICES):
            assert await check(channel, service) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(channel).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "warming up" in (caught.value.details() or "")
        server.built.set()
        assert server.ready is not None
        await asyncio.wait_for(server.ready, 10)
        for service in ("", *SERVICES):
            assert await check(channel, service) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await check(channel, "no.such.Service")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    server.stop.ask()
    await task
    assert server.services.done == ["start", "stop_workers 5", "close"]


async def test_what_the_warm_up_made_is_out_of_the_collectors_sight_while_the_server_runs(tmp_path: Path) -> None:
    async with running(toy_settings(tmp_path)):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


async def test_a_drain_loses_no_accepted_call(tmp_path: Path) -> None:
    async with (
        running(toy_settings(tmp_path)) as (server, addresses),
        grpc.aio.insecure_channel(addresses.grpc) as channel,
    ):
        statuses = health(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await statuses.read()).status == SERVING
        calls = [generate(channel) for _ in range(20)]
        for call in calls:
            assert (await call.read()).HasField("queued")
        server.stop.ask()
        assert (await asyncio.wait_for(statuses.read(), 5)).status == NOT_SERVING
        assert await check(channel, SERVICES[0]) == NOT_SERVING
        refused = generate(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not server.services.done.count("close")
        server.services.generation.release.set()
        for call in calls:
            assert (await call.read()).HasField("finished")
            assert await call.code() is grpc.StatusCode.OK
        assert server.task is not None
        await asyncio.wait_for(server.task, 5)
        assert server.services.done[-1] == "close"


async def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, drain_seconds=600)
    async with running(settings) as (server, addresses), grpc.aio.insecure_channel(addresses.grpc) as channel:
        call = generate(channel)
        await call.read()
        server.stop.ask()
        await asyncio.sleep(0.1)
        assert server.task is not None
        assert not server.task.done()
        server.stop.ask()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(server.task, 5)
    assert server.services.done == ["start", "stop_workers 600", "stop_workers 0", "close"]


async def test_a_stop_during_the_warm_up_does_not_wait_for_it(tmp_path: Path) -> None:
    server = Running(toy_settings(tmp_path), ToyServices(ToyGeneration()), StopRequest(), threading.Event())
    task = server.run()
    await until(lambda: any(thread.name == "hueshift-warm-up" for thread in threading.enumerate()))
    server.stop.ask()
    await asyncio.wait_for(task, 5)
    assert server.services.done == []
    server.built.set()


async def test_a_failed_warm_up_is_the_answer(tmp_path: Path) -> None:
    server = Running(toy_settings(tmp_path), ToyServices(ToyGeneration()), StopRequest(), threading.Event())
    server.fail = InvalidArgument(Reason.MODEL_UNSUPPORTED, "not a model")
    server.built.set()
    with pytest.raises(InvalidArgument, match="not a model"):
        await server.run()


async def test_a_taken_port_is_refused_with_advice(tmp_path: Path) -> None:
    async with running(toy_settings(tmp_path)) as (_, addresses):
        port = int(addresses.grpc.rpartition(":")[2])
        with pytest.raises(InvalidArgument, match=r"server\.port.*free it") as caught:
            async with running(toy_settings(tmp_path, port=port)):
                pass
        assert caught.value.reason is Reason.SETTINGS_INVALID
        metrics_port = int(addresses.metrics.split(":")[2].split("/")[0])
        with pytest.raises(InvalidArgument, match=r"server\.metrics_port.*free it"):
            async with running(toy_settings(tmp_path, metrics_port=metrics_port)):
                pass
        # A second server on the same store is welcome on a port of its own.
        async with running(toy_settings(tmp_path)) as (_, second):
            assert second.grpc != addresses.grpc


async def test_strangers_are_not_served_without_keys(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="hueshift keys create"):
        async with running(toy_settings(tmp_path, host="0.0.0.0", allow_plaintext=True)):
            pass
    settings = toy_settings(tmp_path, host="0.0.0.0", allow_plaintext=True)
    database = Database(settings.store.database, SystemClock())
    key_id, secret = KeyStore(database, SystemClock()).create("acme")
    async with running(settings) as (server, addresses):
        port = addresses.grpc.rpartition(":")[2]
        server.services.generation.release.set()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest()).read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            metadata = (("authorization", f"Bearer {secret}"),)
            answers = [answer async for answer in stub.Generate(pb.GenerateRequest(), metadata=metadata)]
            assert len(answers) == 2
            # Revoking the last key does not open the server again, and takes effect within a second.
            KeyStore(database, SystemClock()).revoke(key_id)
            await asyncio.sleep(1.05)
            with pytest.raises(grpc.aio.AioRpcError) as revoked:
                await stub.Generate(pb.GenerateRequest(), metadata=metadata).read()
            assert revoked.value.code() is grpc.StatusCode.UNAUTHENTICATED
    database.close()


async def test_a_unix_socket(tmp_path: Path) -> None:
    host = f"unix:{tmp_path}/hueshift.sock"
    async with running(toy_settings(tmp_path, host=host)) as (_, addresses):
        assert addresses.grpc == host
        async with grpc.aio.insecure_channel(host) as channel:
            assert await check(channel) == SERVING


async def test_reflection_lists_the_services_and_can_be_turned_off(tmp_path: Path) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with running(toy_settings(tmp_path)) as (_, addresses), grpc.aio.insecure_channel(addresses.grpc) as channel:
        answer = await reflection(channel).ServerReflectionInfo(iter([request])).read()
        assert {service.name for service in answer.list_services_response.service} >= {
            *SERVICES,
            "grpc.health.v1.Health",
        }
    async with (
        running(toy_settings(tmp_path, reflection=False)) as (_, addresses),
        grpc.aio.insecure_channel(addresses.grpc) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection(channel).ServerReflectionInfo(iter([request])).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_messages_above_the_limit_are_refused(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, max_message_bytes=1024 * 1024)
    async with running(settings) as (_, addresses), grpc.aio.insecure_channel(addresses.grpc) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(prompt="x" * (1 << 21))).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await check(channel) == SERVING


async def test_a_method_of_the_contract_that_is_not_there_and_the_metrics_page(tmp_path: Path) -> None:
    async with (
        running(toy_settings(tmp_path)) as (server, addresses),
        grpc.aio.insecure_channel(addresses.grpc) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        server.services.generation.release.set()
        assert len([answer async for answer in generate(channel)]) == 2

        def fetch() -> str:
            with urllib.request.urlopen(addresses.metrics, timeout=5) as answer:
                page: str = answer.read().decode()
                return page

        page = await asyncio.to_thread(fetch)
    assert 'hueshift_requests_total{code="UNIMPLEMENTED",method="hueshift.v1.ModelService/GetModel"} 1.0' in page
    assert 'hueshift_requests_total{code="OK",method="hueshift.v1.GenerationService/Generate"} 1.0' in page
    assert "process_cpu_seconds_total" in page


async def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    services = ToyServices(ToyGeneration())
    reading, writing = os.pipe()
    ready: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    settings = toy_settings(tmp_path)
    task = asyncio.create_task(
        serve(settings, ready=ready.set_result, stop=StopRequest(), parent=reading, build=lambda *_: services)
    )
    await ready
    assert not task.done()
    # What the kernel does for an actor that is killed.
    os.close(writing)
    await asyncio.wait_for(task, 20)
    assert services.done[-1] == "close"
    os.close(reading)


async def test_a_replica_is_announced_while_it_takes_calls(tmp_path: Path) -> None:
    settings = load_settings(
        server={"port": 0, "metrics_port": 0}, store={"path": tmp_path / "store"}, cluster={"role": "replica"}
    )
    async with running(settings) as (_, addresses):
        database = Database(settings.store.database, SystemClock())
        table = ReplicaStore(database)
        async with asyncio.timeout(10):
            while not table.read()[0]:  # noqa: ASYNC110 (the condition is in the database)
                await asyncio.sleep(0.02)
        assert [record.address for record in table.read()[0]] == [addresses.grpc]
    assert table.read() == ([], set())
    database.close()
