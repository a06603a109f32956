"""Keep a job's lease while the main thread trains, and learn from it whether to stop."""

import threading
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.server.clock import Clock
from hueshift.server.store.job_records import Lease
from hueshift.server.store.job_store import JobStore

_LOG = structlog.get_logger()


class LeaseKeeper:
    """Renews a lease from a thread of its own, every second or three times in each lease.

    `lost` turns True when the job is no longer ours; `cancel_requested` when its tenant wants it stopped.
    """

    def __init__(self, jobs: JobStore, lease: Lease, lease_seconds: float, clock: Clock) -> None:
        self.lost = False
        self.cancel_requested = False
        self._jobs = jobs
        self._lease = lease
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._renewed = clock.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_done, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def renew(self) -> None:
        """Renew once. An unreachable database is borne until the lease would have run out."""
        try:
            self.cancel_requested = self._jobs.heartbeat(self._lease, self._lease_seconds)
            self._renewed = self._clock.monotonic()
        except (HueshiftError, SQLAlchemyError) as error:
            taken = isinstance(error, HueshiftError) and error.reason is Reason.LEASE_LOST
            self.lost = taken or self._clock.monotonic() - self._renewed > self._lease_seconds
            _LOG.warning("lease.not_renewed", job=self._lease.job_id, lost=self.lost, exc_info=not taken)

    def _renew_until_done(self) -> None:
        # Cancellation travels by the same call: nobody should wait ten seconds for it.
        pause = min(self._lease_seconds / 3, 1.0)
        while not self.lost and not self._done.wait(pause):
            self.renew()
