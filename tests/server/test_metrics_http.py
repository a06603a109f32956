"""The Prometheus endpoint."""

import socket
import urllib.request

import pytest

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.metrics import Metrics
from hueshift.server.metrics_http import make_registry, start_metrics


def test_page_has_our_families_and_the_process() -> None:
    registry = make_registry()
    metrics = Metrics(registry)
    metrics.requests.labels("hueshift.v1.GenerationService/Generate", "OK").inc()
    metrics.build.info({"version": "1", "engine": "torch"})
    endpoint = start_metrics(registry, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(endpoint.url, timeout=5) as answer:
            page = answer.read().decode()
    finally:
        endpoint.close()
    assert 'hueshift_requests_total{code="OK",method="hueshift.v1.GenerationService/Generate"} 1.0' in page
    for family in ("process_resident_memory_bytes", "python_gc_objects_collected_total", "hueshift_build_info"):
        assert family in page


def test_a_taken_port_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"{port}.*metrics_port") as caught:
            start_metrics(make_registry(), "127.0.0.1", port)
    assert caught.value.reason is Reason.SETTINGS_INVALID


def test_a_closed_endpoint_frees_its_port() -> None:
    registry = make_registry()
    first = start_metrics(registry, "127.0.0.1", 0)
    port = int(first.url.split(":")[2].split("/")[0])
    first.close()
    start_metrics(registry, "127.0.0.1", port).close()
