"""A replica tells that it lives, for as long as it takes calls."""

import asyncio
import secrets
import socket

from hueshift.server.addresses import bracket
from hueshift.server.clock import Clock
from hueshift.server.outages import Observer
from hueshift.server.rounds import keep_doing, try_once
from hueshift.server.settings import Settings
from hueshift.server.store.replicas import ReplicaRecord, ReplicaStore

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


async def keep_announced(
    replicas: ReplicaStore,
    address: str,
    heartbeat: float,
    observer: Observer | None = None,
    clock: Clock | None = None,
) -> None:
    """Announce a replica at `address` every `heartbeat` seconds until cancelled, then withdraw it."""
    record = ReplicaRecord(f"replica-{secrets.token_hex(8)}", address)

    async def announce() -> None:
        # If it fails the next heartbeat tells it; until then front ends use what they know.
        await asyncio.to_thread(replicas.announce, record, LIVES * heartbeat)

    async def withdraw() -> None:
        await asyncio.to_thread(replicas.withdraw, record.replica_id)

    try:
        # Never more seldom than this: with every second of pause after an outage calls pass this replica by.
        await keep_doing("announce", heartbeat, announce, observer, clock=clock, longest=LIVES * heartbeat)
    finally:
        await try_once("announce", withdraw, observer)
