"""The job table as a queue with leases: what survives a crash of worker, server or machine.

A worker holds a job by a lease it renews. A lease that runs out puts the job back, and the next claim raises the job's
fencing token, so every write of the old holder is refused from then on; the adapter is published in the transaction
that ends the job. Every change of state writes its event in the same transaction.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, func, insert, select, tuple_

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import Cancelled, Reason
from hueshift.server.clock import Clock
from hueshift.server.store.database import Database, lock
from hueshift.server.store.idempotency import hash_request, recall, remember
from hueshift.server.store.job_events import append_event, read_events, read_sequences
from hueshift.server.store.job_moves import change_job, held_job, move_job, own_job
from hueshift.server.store.job_numbers import JobNumbers, read_numbers
from hueshift.server.store.job_order import next_job
from hueshift.server.store.job_quotas import OPEN_STATES, JobQuotas, charge, check_queue, check_seconds
from hueshift.server.store.job_records import ClaimedJob, EventKind, JobEvent, JobRecord, JobState, Lease, NewJob
from hueshift.server.store.job_retry import can_retry, check_retry, kept, requeue
from hueshift.server.store.publisher import AdapterFile, AdapterPublisher
from hueshift.server.store.stored_bytes import check_storage
from hueshift.server.store.tables import idempotency, jobs
from hueshift.training.spec import TrainingSpec

CREATE_METHOD = "CreateFineTune"
RETRY_METHOD = "RetryFineTune"
# Enough to find the fault by; the log has the rest.
_CAUSE_LENGTH = 600
# A job may be retried time and again, and every heartbeat reads them all.
_KEPT_FAILURES = 50


class JobStore:
    """Jobs and their leases. Synchronous and safe to share between threads and processes."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        max_attempts: int = 5,
        quotas: JobQuotas | None = None,
        keep_failed_seconds: float = 0.0,
    ) -> None:
        """`keep_failed_seconds` is how long a failed job can be retried; its files are kept as long."""
        self._database = database
        self._clock = clock
        self._max_attempts = max_attempts
        self._quotas = quotas or JobQuotas()
        self._keep_failed = keep_failed_seconds
        self._used: Callable[[str], float | None] = lambda job_id: None

    def metered(self, used: Callable[[str], float | None]) -> Self:
        """Return the same table for a worker that tells what each of its jobs has used of its device, in seconds of
        all attempts; None: the time it has run."""
        metered = copy.copy(self)
        metered._used = used
        return metered

    def create(
        self, new: NewJob, *, tenant_limit: int, idempotency_key: str = "", request_hash: str = ""
    ) -> tuple[JobRecord, bool]:
        """Queue a job; with a key used before for the same request, return that job and True.

        Raises ResourceExhausted (TENANT_QUOTA) when the tenant has `tenant_limit` jobs that have not ended or has used
        up today's device seconds, (TENANT_STORAGE) when its pictures are too much, and AlreadyExists
        (IDEMPOTENCY_CONFLICT).
        """
        with self._database.write() as connection:
            known = recall(connection, new.tenant, CREATE_METHOD, idempotency_key, request_hash)
            if known is not None:
                return own_job(connection, new.tenant, str(known["job_id"])), True
            # Two calls at once must not both take the last place.
            lock(connection, f"jobs/{new.tenant}")
            self._check_quota(connection, new.tenant, tenant_limit)
            check_storage(connection, self._quotas.storage, new.tenant, new.picture_bytes)
            row = connection.execute(insert(jobs).values(new.first_row(self._clock.time())).returning(*jobs.c)).one()
            job = JobRecord.from_row(row)
            append_event(connection, job, job.created, EventKind.STATE, job.snapshot())
            kept = {"job_id": new.job_id}
            remember(connection, new.tenant, CREATE_METHOD, idempotency_key, request_hash, kept)
            return job, False

    def recall(self, tenant: str, idempotency_key: str, request_hash: str) -> JobRecord | None:
        """Return the job an earlier `create` with this key made. Raises AlreadyExists (IDEMPOTENCY_CONFLICT)."""
        with self._database.read() as connection:
            known = recall(connection, tenant, CREATE_METHOD, idempotency_key, request_hash)
            return None if known is None else own_job(connection, tenant, str(known["job_id"]))

    def check_quota(self, tenant: str, tenant_limit: int, idempotency_key: str = "", added: int = 0) -> None:
        """Raise what `create` would raise now of a job with `added` bytes, before a caller uploads for nothing.

        A key used before passes: the call may turn out to be a repetition, which queues nothing.
        """
        used_before = select(idempotency.c.key).where(
            idempotency.c.tenant == tenant,
            idempotency.c.method == CREATE_METHOD,
            idempotency.c.key == idempotency_key,
        )
        with self._database.read() as connection:
            if not idempotency_key or connection.scalar(used_before) is None:
                self._check_quota(connection, tenant, tenant_limit)
                check_storage(connection, self._quotas.storage, tenant, added, exact=False)

    def get(self, tenant: str, job_id: str) -> JobRecord:
        """Return a job of the tenant. Raises NotFound (FINE_TUNE_NOT_FOUND)."""
        with self._database.read() as connection:
            return own_job(connection, tenant, job_id)

    def list_jobs(
        self,
        tenant: str,
        page_size: int,
        after: tuple[float, str] | None = None,
        states: Iterable[JobState] = (),
    ) -> list[JobRecord]:
        """Return at most `page_size` jobs of the tenant, newest first, that follow the row (created, job_id)."""
        query = select(jobs).where(jobs.c.tenant == tenant)
        wanted = [state.value for state in states]
        if wanted:
            query = query.where(jobs.c.state.in_(wanted))
        if after is not None:
            query = query.where(tuple_(jobs.c.created, jobs.c.job_id) < after)
        query = query.order_by(jobs.c.created.desc(), jobs.c.job_id.desc()).limit(page_size)
        with self._database.read() as connection:
            return [JobRecord.from_row(row) for row in connection.execute(query)]

    def events(self, job_id: str, after: int = 0, limit: int = 200) -> list[JobEvent]:
        """Return at most `limit` events above `after`, see `read_events`. The caller has checked whose job it is."""
        with self._database.read() as connection:
            return read_events(connection, job_id, after, limit)

    def sequences(self, job_ids: Collection[str]) -> dict[str, int]:
        """Return the number of the last event of each job. The caller has checked whose jobs they are."""
        with self._database.read() as connection:
            return read_sequences(connection, job_ids)

    def cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Cancel a queued job at once, ask a running one to stop, return an ended one as it is. Raises NotFound."""
        with self._database.write() as connection:
            job = own_job(connection, tenant, job_id, locked=True)
            if job.state is JobState.QUEUED:
                return self._move(connection, job, JobState.CANCELLED)
            if job.state is JobState.RUNNING:
                return change_job(connection, job.job_id, cancel_requested=True)
            return job

    def retry_failed(
        self, tenant: str, job_id: str, *, tenant_limit: int, idempotency_key: str = ""
    ) -> tuple[JobRecord, bool]:
        """Queue a failed job again, its attempts and seconds counted anew; with a key used before for it, True and no
        change.

        Raises NotFound, FailedPrecondition (JOB_NOT_RETRYABLE), ResourceExhausted (TENANT_QUOTA) as `create`, and
        AlreadyExists (IDEMPOTENCY_CONFLICT).
        """
        request_hash = hash_request([job_id.encode()])
        with self._database.write() as connection:
            known = recall(connection, tenant, RETRY_METHOD, idempotency_key, request_hash)
            if known is not None:
                return own_job(connection, tenant, job_id), True
            lock(connection, f"jobs/{tenant}")
            job = own_job(connection, tenant, job_id, locked=True)
            check_retry(job, self._keep_failed, self._clock.time())
            self._check_quota(connection, tenant, tenant_limit)
            remember(connection, tenant, RETRY_METHOD, idempotency_key, request_hash, {"job_id": job_id})
            return requeue(connection, job, self._clock.time()), False

    def can_retry(self, job: JobRecord) -> bool:
        """True if `retry_failed` would take the job now, but for quotas: its files must stay."""
        return can_retry(job, self._keep_failed, self._clock.time())

    def claim(
        self, owner: str, lease_seconds: float, fits: Callable[[TrainingSpec], bool] = lambda spec: True
    ) -> ClaimedJob | None:
        """Take the next job, in the order of `job_order`.

        Returns None when nothing waits that may run now, or when the next one does not fit: none is passed by.
        """
        query = next_job(self._clock.time(), self._quotas)
        with self._database.read() as connection:
            # Idle workers poll; only a job worth taking is worth the write lock.
            spec = connection.scalar(select(jobs.c.spec).where(jobs.c.job_id == query.scalar_subquery()))
            if spec is None or not fits(TrainingSpec.from_json(spec)):
                return None
        with self._database.write() as connection:
            # One at a time: two claims at once would both count the same running jobs, and pass a tenant's limit.
            lock(connection, "jobs/claim")
            waiting = (jobs.c.job_id == connection.scalar(query)) & (jobs.c.state == JobState.QUEUED.value)
            row = connection.execute(select(jobs).where(waiting).with_for_update()).one_or_none()
            if row is None or not fits(TrainingSpec.from_json(row.spec)):
                return None
            now = self._clock.time()  # Other writers may have been waited for longer than a lease lasts.
            job = self._move(
                connection,
                JobRecord.from_row(row),
                JobState.RUNNING,
                attempt=jobs.c.attempt + 1,
                fencing_token=jobs.c.fencing_token + 1,
                lease_owner=owner,
                lease_expires=now + lease_seconds,
                started=func.coalesce(jobs.c.started, now),
                charged=now,
            )
            return ClaimedJob(job, Lease(job.job_id, job.fencing_token))

    def heartbeat(self, lease: Lease, lease_seconds: float) -> JobRecord:
        """Renew a lease and count the time; return the job, which tells whether it is to be cancelled.

        Raises FailedPrecondition (LEASE_LOST).
        """
        with self._database.write() as connection:
            counted = self._charge(connection, held_job(connection, lease))
            expires = self._clock.time() + lease_seconds
            return change_job(connection, lease.job_id, lease_expires=expires, **counted)

    def progress(self, lease: Lease, step: int, loss: float, seconds_per_step: float) -> None:
        """Record the steps done and tell the watchers. Raises FailedPrecondition (LEASE_LOST)."""
        with self._database.write() as connection:
            job = held_job(connection, lease)
            payload = {"step": step, "steps": job.steps, "loss": loss, "seconds_per_step": seconds_per_step}
            job = change_job(connection, job.job_id, step=step, loss=loss, sequence=jobs.c.sequence + 1)
            append_event(connection, job, self._clock.time(), EventKind.PROGRESS, payload)

    def sample(self, lease: Lease, step: int, prompt: str, png: bytes) -> None:
        """Show a sample picture to the watchers. Raises FailedPrecondition (LEASE_LOST)."""
        with self._database.write() as connection:
            job = change_job(connection, held_job(connection, lease).job_id, sequence=jobs.c.sequence + 1)
            payload = {"step": step, "prompt": prompt}
            append_event(connection, job, self._clock.time(), EventKind.SAMPLE, payload, png)

    def checkpoint(self, lease: Lease, path: str) -> None:
        """Record where the newest checkpoint lies. Raises FailedPrecondition (LEASE_LOST)."""
        with self._database.write() as connection:
            change_job(connection, held_job(connection, lease).job_id, checkpoint=path)

    def publish(
        self,
        lease: Lease,
        adapters: AdapterPublisher,
        data: AdapterFile,
        adapter: Adapter,
        scores: Mapping[str, float] | None,
        step: int | None = None,
    ) -> JobRecord:
        """Publish the adapter and end the job, both or neither. `step` is the last one it took; None: all of them.

        Raises FailedPrecondition (LEASE_LOST) when the job is no longer this worker's, Cancelled when its cancellation
        was asked for meanwhile.
        """
        with self._database.write() as connection:
            job = held_job(connection, lease)
            if job.cancel_requested:
                raise Cancelled(Reason.CANCELLED, "the job was cancelled before it could publish")
            published = adapters.publish(
                job.tenant,
                job.adapter_id,
                job.display_name,
                job.labels,
                data,
                adapter,
                job_id=job.job_id,
                connection=connection,
            )
            return self._move(
                connection,
                job,
                JobState.SUCCEEDED,
                revision=published.revision,
                step=job.steps if step is None else step,
                scores=None if scores is None else dict(scores),
                **self._charge(connection, job),
            )

    def fail(self, lease: Lease, reason: str, message: str) -> JobRecord:
        """End a job for good. Raises FailedPrecondition (LEASE_LOST)."""
        with self._database.write() as connection:
            job = held_job(connection, lease)
            counted = self._charge(connection, job)
            changes = {**counted, **self._failure(job, message), "error_reason": reason, "error_message": message}
            return self._move(connection, job, JobState.FAILED, **changes)

    def retry(self, lease: Lease, message: str, delay: float, cause: str = "") -> JobRecord:
        """Put a job back after a failure of ours, to be taken `delay` seconds later at the earliest.

        Out of attempts it fails with ATTEMPTS_EXHAUSTED and `message`. `cause` is kept for the operator, for whom
        `message` would do without one. Raises FailedPrecondition (LEASE_LOST).
        """
        with self._database.write() as connection:
            job = held_job(connection, lease)
            changes = self._charge(connection, job) | self._failure(job, cause or message)
            return self._put_back(connection, job, message, delay, **changes)

    def release(self, lease: Lease, delay: float = 0.0) -> JobRecord:
        """Put a job back because its worker stops or a store is away; this does not count as an attempt.

        It is taken `delay` seconds later at the earliest. Raises as `fail`.
        """
        with self._database.write() as connection:
            job = held_job(connection, lease)
            counted = self._charge(connection, job)
            if job.cancel_requested:
                return self._move(connection, job, JobState.CANCELLED, **counted)
            later = self._clock.time() + delay
            return self._move(connection, job, JobState.QUEUED, attempt=job.attempt - 1, not_before=later, **counted)

    def stop_cancelled(self, lease: Lease) -> JobRecord:
        """End a running job whose cancellation was asked for. Raises FailedPrecondition (LEASE_LOST)."""
        with self._database.write() as connection:
            job = held_job(connection, lease)
            return self._move(connection, job, JobState.CANCELLED, **self._charge(connection, job))

    def expire_leases(self, owner: str | None = None, cause: str = "its worker went silent") -> list[JobRecord]:
        """Put back the jobs whose lease has run out; with `owner`, those of that dead worker whatever their lease.

        `cause` is kept for the operator. Returns the jobs as they stand: queued, cancelled, or failed with
        ATTEMPTS_EXHAUSTED.
        """
        lost: ColumnElement[bool] = jobs.c.state == JobState.RUNNING.value
        lost &= jobs.c.lease_expires < self._clock.time() if owner is None else jobs.c.lease_owner == owner
        with self._database.read() as connection:
            if connection.scalar(select(jobs.c.job_id).where(lost).limit(1)) is None:
                return []
        message = "its worker was lost again and again; the server's log and memory say why"
        with self._database.write() as connection:
            rows = connection.execute(select(jobs).where(lost).with_for_update(skip_locked=True)).all()
            back = []
            for row in rows:
                job = JobRecord.from_row(row)
                changes = {**self._failure(job, cause), "leases_lost": job.leases_lost + 1}
                back.append(self._put_back(connection, job, message, 0.0, **changes))
            return back

    def dead_letters(self, limit: int = 100) -> list[JobRecord]:
        """Return the newest jobs, of all tenants, that were given up after their last attempt."""
        given_up = (jobs.c.state == JobState.FAILED.value, jobs.c.error_reason == Reason.ATTEMPTS_EXHAUSTED.value)
        query = select(jobs).where(*given_up).order_by(jobs.c.ended.desc(), jobs.c.job_id).limit(limit)
        with self._database.read() as connection:
            return [JobRecord.from_row(row) for row in connection.execute(query)]

    def numbers(self) -> JobNumbers:
        """Return how many jobs stand in each state, and what else is told of all together."""
        with self._database.read() as connection:
            return read_numbers(connection)

    def open_jobs(self) -> set[str]:
        """Return the ids of all jobs that have not ended."""
        with self._database.read() as connection:
            return set(connection.scalars(select(jobs.c.job_id).where(jobs.c.state.in_(OPEN_STATES))))

    def kept_jobs(self) -> set[str]:
        """Return the ids of the jobs whose files must stay: those that have not ended, and failed ones to retry."""
        failed = kept(self._keep_failed, self._clock.time())
        with self._database.read() as connection:
            return set(connection.scalars(select(jobs.c.job_id).where(jobs.c.state.in_(OPEN_STATES) | failed)))

    def _charge(self, connection: Connection, job: JobRecord) -> dict[str, float]:
        return charge(connection, job, self._clock.time(), self._used(job.job_id))

    def _check_quota(self, connection: Connection, tenant: str, limit: int) -> None:
        check_queue(connection, tenant, limit)
        check_seconds(connection, tenant, self._quotas, self._clock.time())

    def _failure(self, job: JobRecord, cause: str) -> dict[str, Any]:
        entry = {
            "attempt": job.attempt,
            "time": self._clock.time(),
            "owner": job.lease_owner,
            "cause": cause[:_CAUSE_LENGTH],
        }
        return {"failures": [*job.failures, entry][-_KEPT_FAILURES:]}

    def _put_back(
        self, connection: Connection, job: JobRecord, message: str, delay: float, **changes: Any
    ) -> JobRecord:
        if job.cancel_requested:
            return self._move(connection, job, JobState.CANCELLED, **changes)
        if job.attempt >= self._max_attempts:
            changes |= {
                "error_reason": Reason.ATTEMPTS_EXHAUSTED.value,
                "error_message": f"given up after {job.attempt} attempts: {message}",
            }
            return self._move(connection, job, JobState.FAILED, **changes)
        return self._move(connection, job, JobState.QUEUED, not_before=self._clock.time() + delay, **changes)

    def _move(self, connection: Connection, job: JobRecord, state: JobState, **changes: Any) -> JobRecord:
        return move_job(connection, job, state, self._clock.time(), **changes)
