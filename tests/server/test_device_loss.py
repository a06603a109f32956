"""A server whose device has failed turns NOT_SERVING, drains, and ends with an error, so that it is started again."""

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hueshift.adapters.errors import HueshiftError, Reason, Unavailable
from hueshift.server.addresses import Addresses
from hueshift.server.device_watch import DeviceWatch
from hueshift.server.rpc.handlers import ServiceTable
from hueshift.server.serve import StopRequest, serve
from hueshift.server.settings import Settings, load_settings


@dataclass
class FallibleServices:
    """Services without a model, whose device can be lost."""

    watch: DeviceWatch = field(default_factory=DeviceWatch)
    health: str = ""
    done: list[str] = field(default_factory=list)

    def register(self, table: ServiceTable) -> None:
        """Nothing to serve."""

    async def failure(self) -> HueshiftError:
        """As ServiceSet does it."""
        return await asyncio.shield(asyncio.wrap_future(self.watch.lost))

    async def start(self) -> None:
        """Nothing to start."""

    async def stop_workers(self, grace: float) -> None:
        """Look at health as a probe would, while the server drains."""
        async with grpc.aio.insecure_channel(self.health) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
        self.done.append(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    async def close(self) -> None:
        """Remember it."""
        self.done.append("close")


def make_settings(folder: Path) -> Settings:
    """A server on ports of its own."""
    return load_settings(server={"port": 0, "metrics_port": 0, "drain_seconds": 5}, store={"path": folder / "store"})


async def test_a_lost_device_ends_the_server_with_an_error(tmp_path: Path) -> None:
    services, ready = FallibleServices(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(make_settings(tmp_path), ready=ready.set_result, stop=StopRequest(), build=lambda *_: services)
    )
    addresses: Addresses = await asyncio.wait_for(ready, 20)
    services.health = addresses.grpc
    services.watch.heard(RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(Unavailable) as ended:
        await asyncio.wait_for(task, 20)
    assert ended.value.reason is Reason.DEVICE_LOST
    assert services.done == ["NOT_SERVING", "close"]


async def test_a_normal_stop_leaves_the_watch_alone(tmp_path: Path) -> None:
    services, ready = FallibleServices(), asyncio.get_running_loop().create_future()
    stop = StopRequest()
    task = asyncio.create_task(
        serve(make_settings(tmp_path), ready=ready.set_result, stop=stop, build=lambda *_: services)
    )
    services.health = (await asyncio.wait_for(ready, 20)).grpc
    stop.ask()
    await asyncio.wait_for(task, 20)
    assert not services.watch.lost.done()


def test_only_the_first_loss_is_told_and_other_errors_are_not() -> None:
    watch = DeviceWatch()
    told: list[int] = []
    watch.on_lost(lambda: told.append(1))
    assert not watch.heard(ValueError("no"))
    for _ in range(3):
        assert watch.heard(RuntimeError("CUDA error: unspecified launch failure"))
    # Once it is lost, whatever fails fails because of that.
    assert watch.heard(ValueError("no"))
    assert told == [1]
    lost: Future[Unavailable] = watch.lost
    assert lost.result(0).retry_after
