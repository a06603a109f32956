"""grpc.health.v1: one state for the server, told for every service name and for the empty one."""

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio


class _Servicer(aio.HealthServicer):
    """The standard servicer with List, which it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: dict[str, int] = {}

    async def set(self, service: str, status: int) -> None:
        await super().set(service, status)
        self.statuses[service] = status

    async def enter_graceful_shutdown(self) -> None:
        await super().enter_graceful_shutdown()
        self.statuses = dict.fromkeys(self.statuses, health_pb2.HealthCheckResponse.NOT_SERVING)

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
