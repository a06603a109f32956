"""One wall clock for all hosts that share a database: its server's, carried on by the host's own monotonic time.

Leases and heartbeats end at a time that another host reads. A host whose clock runs ahead by more than a lease would
take every job from the others, again and again until they are given up, and a front end would cut its replicas' calls.
"""

from sqlalchemy import Connection, text

from hueshift.server.clock import Clock

# Quartz drifts by less than 0.1 ms a second, so by 3 ms in this time.
_ASK_SECONDS = 30.0
# An answer that took longer says too little about when it was given.
_SLOWEST_SECONDS = 1.0


class SharedClock:
    """Tells the database server's time once `follow` has asked for it, and `clock`'s before. For any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # The server's seconds since the epoch at the host's monotonic second 0.
        self._origin: float | None = None
        self._asked = float("-inf")

    def monotonic(self) -> float:
        """Seconds that never run backwards, this host's."""
        return self._clock.monotonic()

    def time(self) -> float:
        """Seconds since the epoch, the database server's."""
        return self._clock.time() if self._origin is None else self._origin + self._clock.monotonic()

    def follow(self, connection: Connection) -> None:
        """Ask a Postgres server for its time, if that was not done lately. One query."""
        begun = self._clock.monotonic()
        if begun - self._asked < _ASK_SECONDS:
            return
        told = float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0.0)
        ended = self._clock.monotonic()
        if self._origin is None or ended - begun < _SLOWEST_SECONDS:
            self._origin, self._asked = told - (begun + ended) / 2, ended
