"""The worker: takes jobs, trains them, publishes their adapters. Runs in a process of its own.

It may die at any point. What it had not committed is done again by the next one, from the job's last checkpoint.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog
import torch
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import Cancelled, HueshiftError, Internal, Reason, ResourceExhausted, Unavailable
from hueshift.adapters.file import pack_adapter
from hueshift.engines.device_errors import Fault, classify
from hueshift.server.clock import Clock
from hueshift.server.crew import Crew
from hueshift.server.device_meter import DeviceMeter, step_rows
from hueshift.server.failpoints import Failpoint
from hueshift.server.job_folders import JobFolders
from hueshift.server.job_lease import LeaseKeeper
from hueshift.server.job_limits import JobLimits
from hueshift.server.job_run import JobRun
from hueshift.server.logs import tenant_hash
from hueshift.server.outages import Outage
from hueshift.server.settings import TrainingSettings
from hueshift.server.stop import StopFlag
from hueshift.server.store.job_records import ClaimedJob, JobRecord
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.publisher import AdapterPublisher
from hueshift.training.spec import TrainingSpec

_LOG = structlog.get_logger()
# Ours or the machine's fault: another try may go better.
_TRANSIENT = (Internal, ResourceExhausted)
# How long a job waits for a store that does not answer, time and again for as long as that lasts.
_OUTAGE_SECONDS = 15.0
_MAX_RETRY_SECONDS = 60.0
_TIDY_SECONDS = 600.0
# Longer than any upload: a folder of an unfinished CreateFineTune is never swept.
_TIDY_AGE = 3600.0


@dataclass(frozen=True, slots=True)
class Trained:
    """What training gives: the adapter, its scores where there is a CLIP to score with, and the last step it took.

    `step` None means all steps of the job.
    """

    adapter: Adapter
    scores: Mapping[str, float] | None
    step: int | None = None


class Trainer(Protocol):
    """Trains one job on a base model that is loaded once."""

    def train(
        self,
        spec: TrainingSpec,
        pictures: Sequence[Image.Image],
        masks: Mapping[int, Image.Image],
        work: Path,
        run: JobRun,
    ) -> Trained:
        """Train, resuming from `work`; `masks` are of some pictures, by index. Raises Cancelled when asked to stop."""
        ...


class Worker:
    """Takes jobs until it is asked to stop."""

    def __init__(
        self,
        *,
        owner: str,
        jobs: JobStore,
        adapters: AdapterPublisher,
        folders: JobFolders,
        trainer: Trainer,
        settings: TrainingSettings,
        clock: Clock,
        stop: StopFlag,
        failpoint: Failpoint,
    ) -> None:
        self._owner = owner
        self._meter = DeviceMeter(clock)
        self._jobs = jobs.metered(self._meter.used)
        self._adapters = adapters
        self._folders = folders
        self._trainer = trainer
        self._settings = settings
        self._clock = clock
        self._stop = stop
        self._failpoint = failpoint
        self._outage = Outage("worker", clock=clock)
        self._tidy_at = clock.monotonic() + _TIDY_SECONDS
        self._crew = Crew(settings.jobs_per_worker, self._work_or_wait)

    def run(self) -> None:
        """Take jobs, as many at a time as the settings say, until the stop flag is up."""
        try:
            while not self._stop.requested:
                if self._crew.full or not self._take():
                    time.sleep(self._outage.pause(self._settings.poll_seconds))
        finally:
            self._stop.request()
            self._crew.wait()

    def _take(self) -> bool:
        try:
            self._tidy()
            self._jobs.expire_leases()
            claimed = self._jobs.claim(self._owner, self._settings.lease_seconds, self._crew.fits)
        except (HueshiftError, SQLAlchemyError) as error:
            self._outage.failed(error)
            return False
        self._outage.worked()
        return claimed is not None and self._crew.take(claimed)

    def _work_or_wait(self, claimed: ClaimedJob) -> bool:
        try:
            self.work(claimed)
        except (HueshiftError, SQLAlchemyError):
            # The database does not answer. A job in hand comes back when its lease runs out.
            _LOG.warning("worker.store_unavailable", exc_info=True)
            return False
        return True

    def _tidy(self) -> None:
        """Remove, now and then, what jobs that ended elsewhere left on this host."""
        now = self._clock.monotonic()
        if now >= self._tidy_at:
            self._tidy_at = now + _TIDY_SECONDS
            self._folders.sweep(self._jobs.kept_jobs(), _TIDY_AGE)

    def work(self, claimed: ClaimedJob) -> None:
        """Run one attempt at a job and record its outcome."""
        job = claimed.job
        with self._meter.running(job.job_id, step_rows(job.spec), job.device_seconds):
            self._work(claimed)

    def _work(self, claimed: ClaimedJob) -> None:
        job = claimed.job
        log = _LOG.bind(job=job.job_id, attempt=job.attempt, tenant_hash=tenant_hash(job.tenant))
        log.info("job.taken", method=job.spec.method, steps=job.steps, lost_leases=job.leases_lost)
        self._failpoint.at("claimed")
        begun = self._clock.monotonic()
        try:
            limits = JobLimits(
                self._settings.max_job_seconds, self._settings.max_job_memory, self._crew.share_of_memory
            )
            lease_seconds = self._settings.lease_seconds
            with LeaseKeeper(self._jobs, claimed.lease, lease_seconds, self._clock, limits=limits) as keeper:
                run = JobRun(
                    claimed,
                    jobs=self._jobs,
                    keeper=keeper,
                    stop=self._stop,
                    clock=self._clock,
                    failpoint=self._failpoint,
                    keep=partial(self._folders.keep_checkpoint, claimed.job.job_id, claimed.lease.token),
                )
                self._attempt(claimed, keeper, run)
        except HueshiftError as error:
            if error.reason is not Reason.LEASE_LOST:
                raise
            # Somebody else has the job, or it has ended: nothing of ours may be written.
            log.warning("job.lease_lost")
            return
        log.info("job.left", seconds=round(self._clock.monotonic() - begun, 3))

    def _attempt(self, claimed: ClaimedJob, keeper: LeaseKeeper, run: JobRun) -> None:
        job, lease = claimed.job, claimed.lease
        try:
            trained = self._train(claimed, run)
            self._failpoint.at("before-publish")
            staged = self._adapters.stage(pack_adapter(trained.adapter))
            try:
                self._jobs.publish(lease, self._adapters, staged, trained.adapter, trained.scores, trained.step)
            finally:
                self._adapters.discard(staged)
            self._failpoint.at("after-publish")
        except Cancelled:
            self._stopped(claimed, keeper)
        except (MemoryError, torch.OutOfMemoryError) as error:
            # The next attempt would need as much.
            _LOG.error("job.out_of_memory", job=job.job_id, exc_info=error)
            self._fail(claimed, Reason.JOB_MEMORY_LIMIT, "the job does not fit into the device; use a smaller batch")
        except Unavailable as error:
            # A store is away, which no attempt of this job has brought about.
            _LOG.warning("job.store_unavailable", job=job.job_id, exc_info=error)
            self._jobs.release(lease, _OUTAGE_SECONDS)
        except _TRANSIENT as error:
            self._retry(claimed, error)
        except HueshiftError as error:
            if error.reason is Reason.LEASE_LOST:
                raise
            self._fail(claimed, error.reason, error.message)
        except Exception as error:
            # Whatever it was, the next job deserves a worker, and this one another try.
            self._retry(claimed, error)
            if classify(error) is Fault.LOST:
                # Every later job would fail in this process; a new one has a new context, or cannot start.
                _LOG.critical("worker.device_lost", job=job.job_id)
                self._stop.request()
        else:
            self._folders.end(job.job_id)

    def _train(self, claimed: ClaimedJob, run: JobRun) -> Trained:
        job = claimed.job
        self._folders.fetch(job.job_id)
        pictures = [_open_picture(path) for path in self._folders.pictures(job.job_id)]
        if len(pictures) != len(job.spec.captions):
            raise Internal(
                Reason.INTERNAL, f"{len(pictures)} of {len(job.spec.captions)} pictures lie in the job's folder"
            )
        masks = {index: _open_picture(path) for index, path in self._folders.masks(job.job_id).items()}
        return self._trainer.train(job.spec, pictures, masks, self._folders.work(job.job_id), run)

    def _stopped(self, claimed: ClaimedJob, keeper: LeaseKeeper) -> None:
        keeper.renew()
        if keeper.lost:
            _LOG.warning("job.lease_lost", job=claimed.job.job_id)
        elif keeper.over is not None:
            self._fail(claimed, keeper.over.reason, keeper.over.message)
            # What the job took may not come back to this process: a new one is started.
            self._stop.request()
        elif keeper.cancel_requested:
            self._jobs.stop_cancelled(claimed.lease)
            self._folders.end(claimed.job.job_id)
        else:
            # The operator stops this worker; the job goes on elsewhere, or later, from its checkpoint.
            self._jobs.release(claimed.lease)

    def _fail(self, claimed: ClaimedJob, reason: Reason, message: str) -> None:
        _LOG.warning("job.failed", job=claimed.job.job_id, reason=reason)
        self._end_folder(self._jobs.fail(claimed.lease, reason.value, message))

    def _retry(self, claimed: ClaimedJob, error: Exception) -> None:
        incident = secrets.token_hex(8)
        _LOG.error("job.attempt_failed", job=claimed.job.job_id, incident=incident, exc_info=error)
        delay = min(_MAX_RETRY_SECONDS, 2.0**claimed.job.attempt)
        message = f"training met an internal error (incident {incident}); the operator's log has the cause"
        cause = f"{type(error).__name__}: {error} (incident {incident})"
        self._end_folder(self._jobs.retry(claimed.lease, message, delay, cause))

    def _end_folder(self, job: JobRecord) -> None:
        """Remove the files of a job that has ended; those of one that may be retried stay until a sweep."""
        if job.state.ended and not self._jobs.can_retry(job):
            self._folders.end(job.job_id)


def _open_picture(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as image:
        return image.convert("RGB")
