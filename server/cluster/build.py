"""From the settings to the services of a front end."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import grpc

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.clock import Clock
from hueshift.server.cluster.frontend import FrontEnd
from hueshift.server.cluster.pool import Connect, ReplicaPool
from hueshift.server.metrics import Metrics
from hueshift.server.rpc.contract import FILES
from hueshift.server.settings import Settings
from hueshift.server.store.replicas import ReplicaStore
from hueshift.server.store.stores import Stores


def build_front_end(
    settings: Settings, stores: Stores, metrics: Metrics, clock: Clock, _progress: Callable[[str, int, int], None]
) -> FrontEnd:
    """Build the services of `cluster.role` frontend. Raises InvalidArgument on an unreadable `cluster.replica_ca`."""
    pool = ReplicaPool(
        ReplicaStore(stores.database),
        make_connect(settings),
        clock=clock,
        metrics=metrics,
        heartbeat=settings.cluster.heartbeat_seconds,
        bound=settings.cluster.load_bound,
    )
    metrics.build.info({"version": version("hueshift"), "engine": "none", "role": "frontend"})
    return FrontEnd(pool, FILES, clock, metrics.routed)


def make_connect(settings: Settings) -> Connect:
    """Return what opens a channel to a replica: TLS with `cluster.replica_ca`, else plain."""
    size = settings.server.max_message_bytes
    options = [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        # A replica that comes back is found at its next heartbeat, not after gRPC's two minutes.
        ("grpc.max_reconnect_backoff_ms", 1000),
        # What the replicas permit; a node that is gone without a word is noticed by its row long before.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        # One channel per replica id, even at the address of an earlier one.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    credentials = _credentials(settings.cluster.replica_ca)

    def connect(address: str) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    return connect


def _credentials(authorities: Path | None) -> grpc.ChannelCredentials | None:
    if authorities is None:
        return None
    try:
        return grpc.ssl_channel_credentials(authorities.expanduser().read_bytes())
    except OSError as error:
        raise InvalidArgument.for_field(
            "cluster.replica_ca", f"{error.filename} cannot be read: {error.strerror}", Reason.SETTINGS_INVALID
        ) from error
