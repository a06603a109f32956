"""Keep a job's lease while the main thread trains, and learn from it whether to stop."""

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from hueshift.adapters.errors import HueshiftError, Reason, ResourceExhausted
from hueshift.server.clock import Clock
from hueshift.server.job_limits import JobLimits
from hueshift.server.store.job_records import Lease
from hueshift.server.store.job_store import JobStore

_LOG = structlog.get_logger()


# Between two steps training looks whether it must stop; one that has not by then is stuck.
STUCK_SECONDS = 120.0


class LeaseKeeper:
    """Renews a lease from a thread of its own, every second or three times in each lease.

    `lost` turns True when the job is no longer ours; `cancel_requested` when its tenant wants it stopped; `over` is the
    limit that the job has passed. A job that passes a limit and does not stop is ended here: `stuck` is called, after
    the failure is written, and does not return.
    """

    def __init__(
        self,
        jobs: JobStore,
        lease: Lease,
        lease_seconds: float,
        clock: Clock,
        *,
        limits: JobLimits | None = None,
        stuck: Callable[[], object] = lambda: os._exit(1),
    ) -> None:
        self.lost = False
        self.cancel_requested = False
        self.over: ResourceExhausted | None = None
        self._over_since = 0.0
        self._jobs = jobs
        self._lease = lease
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._limits = limits or JobLimits()
        self._stuck = stuck
        self._renewed = clock.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_done, name="lease", daemon=True)

    @property
    def should_stop(self) -> bool:
        """True when training must end: the job is lost, cancelled or over a limit."""
        return self.lost or self.cancel_requested or self.over is not None

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
            job = self._jobs.heartbeat(self._lease, self._lease_seconds)
            self.cancel_requested = job.cancel_requested
            self._renewed = self._clock.monotonic()
            self._check_limits(job.device_seconds)
        except (HueshiftError, SQLAlchemyError) as error:
            taken = isinstance(error, HueshiftError) and error.reason is Reason.LEASE_LOST
            self.lost = taken or self._clock.monotonic() - self._renewed > self._lease_seconds
            _LOG.warning("lease.not_renewed", job=self._lease.job_id, lost=self.lost, exc_info=not taken)

    def _check_limits(self, seconds: float) -> None:
        now = self._clock.monotonic()
        if self.over is None:
            self.over, self._over_since = self._limits.passed(seconds), now
        elif now - self._over_since > STUCK_SECONDS:
            _LOG.error("job.stuck", job=self._lease.job_id, seconds=STUCK_SECONDS)
            self._jobs.fail(self._lease, self.over.reason.value, self.over.message)
            self._stuck()

    def _renew_until_done(self) -> None:
        # Cancellation travels by the same call: nobody should wait ten seconds for it.
        pause = min(self._lease_seconds / 3, 1.0)
        while not self.lost and not self._done.wait(pause):
            self.renew()
