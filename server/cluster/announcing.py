"""A replica tells that it lives, for as long as it takes calls."""

import asyncio
import secrets
import socket

import structlog
from sqlalchemy.exc import SQLAlchemyError

from hueshift.adapters.errors import HueshiftError
from hueshift.server.addresses import bracket
from hueshift.server.settings import Settings
from hueshift.server.store.replicas import ReplicaRecord, ReplicaStore

_LOG = structlog.get_logger()
# A heartbeat may be late twice before the replica counts as dead.
LIVES = 3.0
_WILDCARDS = ("0.0.0.0", "::", "[::]")


def advertised(settings: Settings, grpc_address: str) -> str:
    """Return the target that front ends shall call: `cluster.advertise`, or the bound address by the host's name.

    A port of 0 in `cluster.advertise` stands for the bound one.
    """
    port = grpc_address.rpartition(":")[2]
    given = settings.cluster.advertise
    if given:
        host, _, named = given.rpartition(":")
        return f"{host}:{port}" if named == "0" else given
    if settings.server.host.strip() in _WILDCARDS:
        return f"{bracket(socket.gethostname())}:{port}"
    return grpc_address


async def keep_announced(replicas: ReplicaStore, address: str, heartbeat: float) -> None:
    """Announce a replica at `address` every `heartbeat` seconds until cancelled, then withdraw it."""
    record = ReplicaRecord(f"replica-{secrets.token_hex(8)}", address)
    try:
        while True:
            try:
                await asyncio.to_thread(replicas.announce, record, LIVES * heartbeat)
            except (HueshiftError, SQLAlchemyError):
                # The next heartbeat tells it; until then front ends use what they know.
                _LOG.warning("replica.not_announced", exc_info=True)
            await asyncio.sleep(heartbeat)
    finally:
        try:
            await asyncio.to_thread(replicas.withdraw, record.replica_id)
        except (HueshiftError, SQLAlchemyError):
            _LOG.warning("replica.not_withdrawn", exc_info=True)
