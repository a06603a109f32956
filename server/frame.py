"""The server around the services: port, interceptors, health, metrics, and the order in which they begin and end.

The port opens before the model is loaded, so that probes see NOT_SERVING and callers get WARMING_UP with a time to
retry, instead of a refused connection.
"""

import asyncio
from typing import Protocol

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.addresses import Addresses, Bind, check_exposure, read_bind
from hueshift.server.auth import Authenticator
from hueshift.server.certificates import Certificates
from hueshift.server.clock import Clock
from hueshift.server.metrics import Metrics
from hueshift.server.metrics_http import MetricsEndpoint, make_registry, start_metrics
from hueshift.server.rpc.contract import FILES, SERVICES
from hueshift.server.rpc.gate import Gate
from hueshift.server.rpc.handlers import ServiceTable
from hueshift.server.rpc.health import Health
from hueshift.server.rpc.interceptors import WATCH, make_interceptors
from hueshift.server.settings import ServerSettings, Settings
from hueshift.server.store.keys import KeyStore
from hueshift.server.store.stores import Stores

_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
_HEALTH = "grpc.health.v1.Health"
# What is left on the port when the gate is empty are health and reflection streams, which nobody needs to see end.
_STOP_SECONDS = 0.2


class Services(Protocol):
    """What is behind the port once it is warm."""

    def register(self, table: ServiceTable) -> None:
        """Add the services to the table."""
        ...

    async def start(self) -> None:
        """Start what runs in the background; called in the event loop, once, before the first call."""
        ...

    async def stop_workers(self, grace: float) -> None:
        """Let the workers put their jobs back; runs beside the draining of calls."""
        ...

    async def close(self) -> None:
        """Stop everything; no call is inside any more."""
        ...


class Frame:
    """One server. `start`, then `open` with the services, then `close`; all in one event loop."""

    def __init__(self, settings: Settings, stores: Stores, clock: Clock) -> None:
        self._settings = settings
        self._stores = stores
        self._clock = clock
        self._services: Services | None = None
        self._metrics_endpoint: MetricsEndpoint | None = None
        self._server: grpc.aio.Server | None = None
        self._hurrying: asyncio.Task[None] | None = None
        self.metrics = Metrics(make_registry())
        self.gate = Gate({WATCH}, settings.server.max_calls, settings.server.tenant_calls)
        self.health = Health(SERVICES)
        self.addresses = Addresses("", "")

    async def start(self) -> Addresses:
        """Open the port and the metrics endpoint, with health NOT_SERVING.

        Raises InvalidArgument (SETTINGS_INVALID) when an address cannot be bound, or strangers could call.
        """
        settings = self._settings.server
        keys = KeyStore(self._stores.database, self._clock)
        bind = read_bind(settings)
        check_exposure(bind, settings, keys_exist=await asyncio.to_thread(keys.any))
        await self.health.warming()
        authenticator = Authenticator(
            keys,
            self._clock,
            default_tenant=self._settings.auth.default_tenant,
            required=self._settings.auth.required or not bind.is_local,
        )
        self._table = self._make_table()
        self._server = grpc.aio.server(
            handlers=[self._table],
            interceptors=make_interceptors(
                settings=settings,
                metrics=self.metrics,
                authenticator=authenticator,
                gate=self.gate,
                clock=self._clock,
                label=self._table.label,
            ),
            options=_channel_options(settings),
        )
        port = _bind(self._server, bind, settings)
        self._metrics_endpoint = start_metrics(self.metrics.registry, settings.metrics_host, settings.metrics_port)
        await self._server.start()
        self.addresses = Addresses(grpc=bind.target(port), metrics=self._metrics_endpoint.url)
        return self.addresses

    async def open(self, services: Services) -> None:
        """Let calls in: the services are warm."""
        self._services = services
        await services.start()
        services.register(self._table)
        self.gate.open()
        await self.health.serving()

    async def close(self, grace: float) -> int:
        """Drain and stop; return how many calls were cut off because they did not finish within `grace` seconds.

        Health turns first, new calls are refused, calls inside finish, workers put their jobs back, then the port
        closes. May be called at any point after construction.
        """
        structlog.get_logger().info("server draining", calls=self.gate.inside, grace_seconds=grace)
        await self.health.draining()
        workers = asyncio.create_task(self._services.stop_workers(grace)) if self._services else None
        cut = await self.gate.drain(grace)
        if workers is not None:
            await workers
        if self._hurrying is not None:
            await self._hurrying
        if self._server is not None:
            await self._server.stop(_STOP_SECONDS)
        if self._services is not None:
            await self._services.close()
        if self._metrics_endpoint is not None:
            await asyncio.to_thread(self._metrics_endpoint.close)
        return cut

    def hurry(self) -> None:
        """Make a running `close` end at once: calls inside get UNAVAILABLE, workers are killed and resume later."""
        self.gate.cut()
        if self._services is not None and self._hurrying is None:
            self._hurrying = asyncio.create_task(self._services.stop_workers(0))

    def _make_table(self) -> ServiceTable:
        table = ServiceTable([*FILES, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR])
        registrar: grpc.aio.Server = table  # type: ignore[assignment]  # generated code needs its two methods only
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, registrar)
        if self._settings.server.reflection:
            names = (*SERVICES, _HEALTH, _REFLECTION)
            servicer = reflection_aio.ReflectionServicer(names)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, registrar)  # type: ignore[no-untyped-call]
        return table


def _channel_options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Otherwise two servers share one port in silence, and each gets some of the calls.
        ("grpc.so_reuseport", 0),
        # Clients may ping every 30 s, calls or no calls, to keep their connection through proxies.
        ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A caller that is gone without a word is noticed in 80 s, not in two hours: a watch has no deadline, and would
        # hold its place. gRPC goes by the timeout of pings in general, which is 60 s, not by that of keepalive alone.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
    ]
    if settings.max_connection_age_seconds:
        # Calls inside get all the time they need: there is no grace period but their own end.
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1000)))
    return options


def _bind(server: grpc.aio.Server, bind: Bind, settings: ServerSettings) -> int:
    try:
        if settings.tls_certificate is None or settings.tls_key is None:
            return server.add_insecure_port(bind.target())
        credentials = Certificates(settings.tls_certificate, settings.tls_key).credentials()
        return server.add_secure_port(bind.target(), credentials)
    except RuntimeError as error:
        raise InvalidArgument.for_field(
            "server.port",
            f"cannot listen on {bind.target()}; free it, set server.port to another port (0 picks a free one), or "
            "check the address",
            Reason.SETTINGS_INVALID,
        ) from error
