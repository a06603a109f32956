"""gRPC ignores an option whose name it does not know; each of ours must be in its library."""

from importlib.util import find_spec
from pathlib import Path

from hueshift.client.connection import Connection
from hueshift.server.frame import _channel_options
from hueshift.server.settings import ServerSettings


def test_grpc_knows_every_channel_option() -> None:
    spec = find_spec("grpc._cython.cygrpc")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).read_bytes()
    names = {name for name, _ in _channel_options(ServerSettings(max_connection_age_seconds=60))}
    names |= {name for name, _ in Connection("127.0.0.1:1")._options()}
    assert "grpc.max_connection_age_ms" in names
    assert "grpc.keepalive_permit_without_calls" in names
    assert [name for name in sorted(names) if name.encode() not in library] == []
