"""grpc.health.v1: one state for the server, told for every service name and for the empty one."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio


class _Servicer(aio.HealthServicer):
    """The standard servicer with List, which it leaves out, and a Watch that nobody's reading holds up.

    The standard one writes to a watcher under the lock that changes of the state wait for: a stranger that watches
    without reading would keep the server from draining.
    """

    def __init__(self) -> None:
        super().__init__()
        self.statuses: dict[str, int] = {}
        self._final = False
        self._changed = asyncio.Event()

    async def set(self, service: str, status: int) -> None:
        if not self._final:
            await super().set(service, status)
            self._tell({**self.statuses, service: status})

    async def enter_graceful_shutdown(self) -> None:
        self._final = True
        await super().enter_graceful_shutdown()
        self._tell(dict.fromkeys(self.statuses, health_pb2.HealthCheckResponse.NOT_SERVING))

    async def Watch(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        last = None
        while True:
            changed = self._changed
            status = self.statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
            last = status
            await changed.wait()

    def _tell(self, statuses: dict[str, int]) -> None:
        self.statuses = statuses
        self._changed.set()
        self._changed = asyncio.Event()

    async def List(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        # The typed stubs are older than List.
        messages: Any = health_pb2
        return messages.HealthListResponse(
            statuses={name: health_pb2.HealthCheckResponse(status=status) for name, status in self.statuses.items()}
        )


class Health:
    """NOT_SERVING until the warm-up has ended, SERVING after it, NOT_SERVING for good once the server drains."""

    def __init__(self, services: Sequence[str]) -> None:
        self._names = ("", *services)
        self.servicer = _Servicer()

    async def warming(self) -> None:
        """Answer NOT_SERVING. Call this before the port opens: the servicer's own default is SERVING."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def serving(self) -> None:
        """Answer SERVING, unless `draining` was called."""
        await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def draining(self) -> None:
        """Answer NOT_SERVING from now on."""
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, status: int) -> None:
        for name in self._names:
            await self.servicer.set(name, status)
