"""The replicas that are alive, as rows that they renew themselves. Front ends read them; nobody else decides.

A row says where a replica is, not what it does: a lost row costs a replica its calls until its next heartbeat, a row
too many costs a front end one failed try.
"""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update

from hueshift.server.store.database import Database, now
from hueshift.server.store.tables import replicas


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A replica: its id, new at every start, and the gRPC target at which front ends reach it."""

    replica_id: str
    address: str


class ReplicaStore:
    """The table of replicas. Synchronous, safe for several threads and processes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def announce(self, replica: ReplicaRecord, seconds: float) -> None:
        """Say that the replica lives, for so many seconds from now."""
        with self._database.write() as connection:
            time = now(connection)
            renewed = update(replicas).where(replicas.c.replica_id == replica.replica_id).values(expires=time + seconds)
            if connection.execute(renewed).rowcount:
                return
            # One address, one replica: what stood there before its restart is gone. So are those dead for long.
            gone = (replicas.c.address == replica.address) | (replicas.c.expires < time - 100 * seconds)
            connection.execute(delete(replicas).where(gone))
            values = {"replica_id": replica.replica_id, "address": replica.address}
            connection.execute(insert(replicas).values(**values, started=time, expires=time + seconds))

    def withdraw(self, replica_id: str) -> None:
        """Say that the replica takes no more calls."""
        with self._database.write() as connection:
            connection.execute(delete(replicas).where(replicas.c.replica_id == replica_id))

    def read(self) -> tuple[list[ReplicaRecord], set[str]]:
        """Return the replicas alive, in the order of their ids, and the ids of those that went silent.

        One that withdrew is in neither.
        """
        with self._database.read() as connection:
            rows = connection.execute(select(replicas).order_by(replicas.c.replica_id)).all()
            time = now(connection)
        live = [ReplicaRecord(row.replica_id, row.address) for row in rows if row.expires >= time]
        return live, {row.replica_id for row in rows if row.expires < time}
