"""The Prometheus endpoint: our own registry over HTTP, with the process and the garbage collector."""

import gc
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.addresses import bracket


class MetricsEndpoint:
    """A running endpoint. Scrapes are answered on threads of their own and never touch the event loop."""

    def __init__(self, server: WSGIServer, thread: Thread, host: str) -> None:
        self._server = server
        self._thread = thread
        self.url = f"http://{bracket(host)}:{server.server_port}/metrics"

    def close(self) -> None:
        """Stop answering. Blocks until the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def make_registry() -> CollectorRegistry:
    """Return a registry with the collectors of the process, the platform and the garbage collector."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    if hasattr(gc, "callbacks"):
        GCCollector(registry=registry)
    return registry


def start_metrics(registry: CollectorRegistry, host: str, port: int) -> MetricsEndpoint:
    """Answer scrapes on host:port (0 picks a free one). Raises InvalidArgument (SETTINGS_INVALID) on a broken one."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InvalidArgument.for_field(
            "server.metrics_port",
            f"cannot listen on {bracket(host)}:{port} ({error.strerror or error}); free it, or set "
            "server.metrics_port to another port (0 picks a free one)",
            Reason.SETTINGS_INVALID,
        ) from error
    return MetricsEndpoint(server, thread, host)
