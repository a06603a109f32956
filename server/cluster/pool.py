"""The replicas that one front end knows: a channel to each, how much runs there, and which do not answer."""

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from hueshift.adapters.errors import Reason, Unavailable
from hueshift.server.clock import Clock
from hueshift.server.cluster.affinity import choose, ranked
from hueshift.server.cluster.announcing import LIVES
from hueshift.server.metrics import Metrics
from hueshift.server.rounds import keep_doing
from hueshift.server.store.replicas import ReplicaRecord, ReplicaStore

_LOG = structlog.get_logger()
Connect = Callable[[str], grpc.aio.Channel]


@dataclass(eq=False)
class Replica:
    """A replica and the calls this front end has there. `lost`: its row has run out, and its calls were cut."""

    record: ReplicaRecord
    channel: grpc.aio.Channel
    load: int = 0
    lost: bool = False
    suspect_until: float = float("-inf")
    calls: set[Any] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @contextmanager
    def carrying(self, cost: int) -> Iterator[None]:
        """Count a call of so many pictures while the block runs."""
        self.load += cost
        try:
            yield
        finally:
            self.load -= cost

    @contextmanager
    def watching(self, call: Any) -> Iterator[None]:
        """Cancel the call when the block ends, or when the replica is lost."""
        self.calls.add(call)
        self.idle.clear()
        try:
            yield
        finally:
            call.cancel()
            self.calls.discard(call)
            if not self.calls:
                self.idle.set()


class ReplicaPool:
    """Reads the table of replicas every `heartbeat` seconds. Lives on the front end's event loop."""

    def __init__(
        self,
        store: ReplicaStore,
        connect: Connect,
        *,
        clock: Clock,
        metrics: Metrics,
        heartbeat: float,
        bound: float,
    ) -> None:
        self._store = store
        self._connect = connect
        self._clock = clock
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._bound = bound
        self._replicas: dict[str, Replica] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def refresh(self) -> None:
        """Take in who is alive; cut the calls to those who are not, which would otherwise wait for their node."""
        records, silent = await asyncio.to_thread(self._store.read)
        live = {record.replica_id: record for record in records}
        for replica_id in self._replicas.keys() - live.keys():
            gone = self._replicas.pop(replica_id)
            # One that withdrew drains: its calls shall finish there.
            gone.lost = replica_id in silent
            _LOG.warning("replica.gone", replica=replica_id, calls=len(gone.calls), lost=gone.lost)
            for call in tuple(gone.calls) if gone.lost else ():
                call.cancel()
            self._close_later(gone)
        for replica_id in live.keys() - self._replicas.keys():
            record = live[replica_id]
            self._replicas[replica_id] = Replica(record, self._connect(record.address))
            _LOG.info("replica.found", replica=replica_id, address=record.address)
        self._metrics.replicas.set(len(self._replicas))

    async def keep_fresh(self) -> None:
        """Refresh until cancelled. An unreachable database is borne: what was known stays in use."""
        longest = LIVES * self._heartbeat
        await keep_doing("replicas", self._heartbeat, self.refresh, self._metrics, clock=self._clock, longest=longest)

    def pick(self, key: str, cost: int, tried: Collection[Replica] = ()) -> Replica:
        """Return the replica for a call, not one of `tried`. Raises Unavailable (NO_REPLICA)."""
        now = self._clock.monotonic()
        others = {name: each for name, each in self._replicas.items() if each not in tried}
        sound = {name: each for name, each in others.items() if each.suspect_until <= now}
        candidates = sound or others
        chosen = choose(key, {name: each.load for name, each in candidates.items()}, cost, self._bound)
        if chosen is None:
            raise Unavailable(
                Reason.NO_REPLICA,
                "no replica answers; they may be starting, so try again in a moment",
                retry_after=max(1.0, self._heartbeat),
            )
        return candidates[chosen]

    def affine(self, key: str) -> Replica | None:
        """Return the replica whose slots should hold the key's adapters, whatever its load."""
        order = ranked(key, self._replicas)
        return self._replicas[order[0]] if order else None

    def suspect(self, replica: Replica) -> None:
        """Pass a replica by for some heartbeats, because it did not answer."""
        replica.suspect_until = self._clock.monotonic() + 3 * self._heartbeat

    async def close(self) -> None:
        """Close every channel."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await asyncio.gather(*(replica.channel.close() for replica in self._replicas.values()))

    def _close_later(self, replica: Replica) -> None:
        async def close() -> None:
            # Calls that still run there end by themselves, or were cut.
            await replica.idle.wait()
            await replica.channel.close()

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
