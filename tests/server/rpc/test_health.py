"""The state of the server as health probes see it."""

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from hueshift.server.rpc.health import Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Watcher:
    """The context of a Watch call; without `reads` nothing that is written ever arrives."""

    def __init__(self, *, reads: bool = True) -> None:
        self.seen: list[int] = []
        self._reads = reads

    async def write(self, answer: health_pb2.HealthCheckResponse) -> None:
        if not self._reads:
            await asyncio.Event().wait()
        self.seen.append(answer.status)


def watch(health: Health, watcher: Watcher, service: str = "") -> asyncio.Task[None]:
    context: Any = watcher
    return asyncio.create_task(health.servicer.Watch(health_pb2.HealthCheckRequest(service=service), context))


async def test_every_watcher_sees_every_change() -> None:
    health, watchers = Health(["one"]), [Watcher(), Watcher(), Watcher()]
    await health.warming()
    tasks = [watch(health, watcher, name) for watcher, name in zip(watchers, ("", "one", "other"), strict=True)]
    for change in (health.serving, health.draining):
        await asyncio.sleep(0.01)
        await change()
    await asyncio.sleep(0.01)
    assert [watcher.seen for watcher in watchers] == [[NOT_SERVING, SERVING, NOT_SERVING]] * 2 + [[UNKNOWN]]
    for task in tasks:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_watcher_that_reads_nothing_holds_nobody_up() -> None:
    health, reader = Health([]), Watcher()
    await health.warming()
    tasks = [watch(health, Watcher(reads=False)), watch(health, reader)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(2):
        await health.serving()
        await asyncio.sleep(0.01)
        await health.draining()
    await asyncio.sleep(0.01)
    assert reader.seen == [NOT_SERVING, SERVING, NOT_SERVING]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_server_that_drains_never_serves_again() -> None:
    health, watcher = Health([]), Watcher()
    await health.warming()
    await health.draining()
    await health.serving()
    task = watch(health, watcher)
    await asyncio.sleep(0.01)
    assert watcher.seen == [NOT_SERVING]
    context: Any = None
    listed = await health.servicer.List(health_pb2.HealthCheckRequest(), context)
    assert [state.status for state in listed.statuses.values()] == [NOT_SERVING]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
