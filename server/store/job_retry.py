"""Failed jobs that may be tried again: which, for how long, and what is counted anew.

A job that was given up for troubles of ours, or at a limit that the operator has raised since, may go better the next
time. One whose loss diverged, or whose words the model does not know, would only fail once more.
"""

from sqlalchemy import ColumnElement, Connection

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.server.store.job_moves import move_job
from hueshift.server.store.job_records import JobRecord, JobState
from hueshift.server.store.tables import jobs

RETRYABLE = frozenset({Reason.ATTEMPTS_EXHAUSTED, Reason.JOB_TIME_LIMIT, Reason.JOB_MEMORY_LIMIT})


def can_retry(job: JobRecord, keep_seconds: float, now: float) -> bool:
    """True if the job failed in a way that another try may mend, less than `keep_seconds` ago."""
    recent = job.ended is not None and now - job.ended < keep_seconds
    return job.state is JobState.FAILED and job.error_reason in RETRYABLE and recent


def kept(keep_seconds: float, now: float) -> ColumnElement[bool]:
    """The jobs of which `can_retry` is true, as a condition of a query."""
    return (
        (jobs.c.state == JobState.FAILED.value)
        & jobs.c.error_reason.in_(sorted(RETRYABLE))
        & (jobs.c.ended > now - keep_seconds)
    )


def check_retry(job: JobRecord, keep_seconds: float, now: float) -> None:
    """Raise FailedPrecondition (JOB_NOT_RETRYABLE) saying why a job cannot be retried."""
    if can_retry(job, keep_seconds, now):
        return
    if job.state is not JobState.FAILED:
        why = f"it is {job.state.value}; allowed: failed jobs"
    elif job.error_reason not in RETRYABLE:
        why = (
            f"it failed with {job.error_reason}, and would again; send it anew with what its error message advises. "
            f"Allowed: {', '.join(sorted(RETRYABLE))}"
        )
    else:
        why = (
            f"it failed {now - (job.ended or now):.0f} seconds ago, and files of failed jobs are kept for "
            f"{keep_seconds:.0f} (training.keep_failed_seconds); send it anew with its pictures"
        )
    raise not_retryable(job.job_id, why)


def not_retryable(job_id: str, why: str) -> FailedPrecondition:
    """Return the error of a job that cannot be retried."""
    return FailedPrecondition(
        Reason.JOB_NOT_RETRYABLE, f"job {job_id} cannot be retried: {why}", metadata={"job": job_id}
    )


def requeue(connection: Connection, job: JobRecord, now: float) -> JobRecord:
    """Queue a failed job again: attempts and the seconds that its limit looks at begin anew; causes stay on record.

    The tenant's seconds of the day stay counted, and the fencing token goes on rising.
    """
    return move_job(
        connection,
        job,
        JobState.QUEUED,
        now,
        attempt=0,
        not_before=0.0,
        cancel_requested=False,
        device_seconds=0.0,
        error_reason=None,
        error_message=None,
        ended=None,
    )
