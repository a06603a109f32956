"""One attempt at one job: what training tells goes to the job table, what tenant and operator want goes to training."""

from collections.abc import Callable
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.server.clock import Clock
from hueshift.server.failpoints import Failpoint
from hueshift.server.job_lease import LeaseKeeper
from hueshift.server.stop import StopFlag
from hueshift.server.store.job_records import ClaimedJob
from hueshift.server.store.job_store import JobStore

_LOG = structlog.get_logger()
# Twice a second looks alive to a person; a thousand events draw any loss curve and bound the table.
_PROGRESS_SECONDS = 0.5
_PROGRESS_EVENTS = 1000


class JobRun:
    """The hooks of one training run (`hueshift.training.run.TrainingHooks`), called from the training thread."""

    def __init__(
        self,
        claimed: ClaimedJob,
        *,
        jobs: JobStore,
        keeper: LeaseKeeper,
        stop: StopFlag,
        clock: Clock,
        failpoint: Failpoint,
        keep: Callable[[Path], None] | None = None,
    ) -> None:
        """`keep` brings a checkpoint to where other hosts find it."""
        self._job = claimed.job
        self._lease = claimed.lease
        self._jobs = jobs
        self._keeper = keeper
        self._stop = stop
        self._clock = clock
        self._failpoint = failpoint
        self._keep = keep
        self._reported_at = float("-inf")
        self._reported_step: int | None = None
        self._losses: list[float] = []
        self._seconds = 0.0

    def on_step(self, step: int, loss: float, seconds: float) -> None:
        """Count one step; report the mean of those since the last report, now and then and at the end."""
        self._losses.append(loss)
        self._seconds += seconds
        every = max(1, self._job.steps // _PROGRESS_EVENTS)
        due = self._reported_step is None or step - self._reported_step >= every
        now = self._clock.monotonic()
        if step < self._job.steps and not (due and now - self._reported_at >= _PROGRESS_SECONDS):
            return
        count = len(self._losses)
        try:
            self._jobs.progress(self._lease, step, sum(self._losses) / count, self._seconds / count)
        except (HueshiftError, SQLAlchemyError) as error:
            self._note(error)
        self._reported_at, self._reported_step = now, step
        self._losses, self._seconds = [], 0.0

    def on_sample(self, step: int, prompt: str, png: bytes) -> None:
        """Show a sample picture."""
        try:
            self._jobs.sample(self._lease, step, prompt, png)
        except (HueshiftError, SQLAlchemyError) as error:
            self._note(error)

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Record a checkpoint."""
        try:
            if self._keep is not None:
                self._keep(path)
            self._jobs.checkpoint(self._lease, path.name)
        except (HueshiftError, SQLAlchemyError) as error:
            self._note(error)

    def should_stop(self) -> bool:
        """True when the lease is lost, the tenant cancelled, a limit is passed, or the worker is to stop."""
        return self._keeper.should_stop or self._stop.requested

    def at(self, name: str) -> None:
        """Pass a failpoint."""
        self._failpoint.at(name)

    def _note(self, error: HueshiftError | SQLAlchemyError) -> None:
        # Reports are for people: a busy database must not cost an hour of training. A lost lease ends it.
        reason = error.reason if isinstance(error, HueshiftError) else None
        if reason is Reason.LEASE_LOST:
            self._keeper.lost = True
        _LOG.warning("job.report_failed", job=self._job.job_id, reason=reason, exc_info=reason is None)
