"""TLS on loopback: certificates are renewed without a restart, and connections end after a while."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.certificates import Certificates
from hueshift.server.clock import SystemClock
from hueshift.server.frame import Frame
from hueshift.server.settings import Settings, load_settings
from hueshift.server.store.stores import open_stores

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the test's certificates")
SERVED = health_pb2.HealthCheckResponse.NOT_SERVING


def make_pair(folder: Path) -> tuple[Path, Path]:
    """A new certificate for localhost and its key."""
    folder.mkdir(exist_ok=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    line = [*command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(line, check=True, capture_output=True)
    return certificate, key


def settings_of(folder: Path, **server: object) -> Settings:
    return load_settings(server={"port": 0, "metrics_port": 0, **server}, store={"path": folder / "store"})


async def ask(port: str, authority: bytes) -> int:
    """Health over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(authority)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer: health_pb2.HealthCheckResponse = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return answer.status


@needs_openssl
async def test_a_renewed_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    old = await asyncio.to_thread(make_pair, tmp_path / "old")
    new = await asyncio.to_thread(make_pair, tmp_path / "new")
    live = tmp_path / "live"
    shutil.copytree(tmp_path / "old", live)
    settings = settings_of(tmp_path, tls_certificate=live / "certificate.pem", tls_key=live / "key.pem")
    clock = SystemClock()
    stores = open_stores(settings, clock)
    frame = Frame(settings, stores, clock)
    try:
        port = (await frame.start()).grpc.rpartition(":")[2]
        authorities = old[0].read_bytes(), new[0].read_bytes()
        assert await ask(port, authorities[0]) == SERVED
        # Half a renewal: the certificate is there, its key is not. The old pair stays.
        shutil.copy(new[0], live)
        with capture_logs() as logs:
            for _ in range(2):
                assert await ask(port, authorities[0]) == SERVED
        assert [entry["event"] for entry in logs].count("certificate not renewed") == 1
        shutil.copy(new[1], live)
        assert await ask(port, authorities[1]) == SERVED
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(port, authorities[0])
        # Gone altogether, the files leave what is served as it is.
        (live / "key.pem").unlink()
        assert await ask(port, authorities[1]) == SERVED
    finally:
        await frame.close(1)
        stores.close()


@needs_openssl
def test_files_that_cannot_serve_are_refused_at_start(tmp_path: Path) -> None:
    one, other = make_pair(tmp_path / "one"), make_pair(tmp_path / "other")
    with pytest.raises(InvalidArgument, match="cannot be read") as caught:
        Certificates(tmp_path / "no.pem", one[1])
    assert caught.value.reason is Reason.SETTINGS_INVALID
    with pytest.raises(InvalidArgument, match="are not a PEM certificate chain and its key"):
        Certificates(one[0], other[1])
    with pytest.raises(InvalidArgument, match="are not a PEM"):
        Certificates(one[1], one[0])
    assert Certificates(*one).renewed() is None


async def test_old_connections_end_and_clients_come_back(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, max_connection_age_seconds=0.3)
    clock = SystemClock()
    stores = open_stores(settings, clock)
    frame = Frame(settings, stores, clock)
    try:
        address = (await frame.start()).grpc
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watching = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == SERVED
            async with asyncio.timeout(10):
                while channel.get_state() is grpc.ChannelConnectivity.READY:
                    await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            # What runs goes on on the old connection, and the next call opens a new one.
            assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == SERVED
            assert not watching.done()
            watching.cancel()
    finally:
        await frame.close(1)
        stores.close()
