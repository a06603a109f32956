"""Jobs removed because their tenant asks for it: rows, events and samples at once, files right after by the caller.

Nothing of a job's content stays. What stays are numbers: the device seconds of the day in the table of usage, and the
job's id in answers kept by idempotency key, for a week. An adapter that the job made is left to DeleteAdapter.
"""

from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, func, select

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.server.store.database import Database
from hueshift.server.store.idempotency import hash_request, recall, remember
from hueshift.server.store.job_moves import own_job
from hueshift.server.store.job_records import JobState
from hueshift.server.store.stored_bytes import StorageQuota, pictures_there
from hueshift.server.store.tables import job_events, jobs

DELETE_METHOD = "DeleteFineTune"


@dataclass(frozen=True, slots=True)
class DeletedJob:
    """What a deletion removed: events, and bytes of training pictures that were still kept."""

    events: int
    picture_bytes: int


class JobRemoval:
    """Removes jobs of a tenant. Synchronous, safe for several threads and processes."""

    def __init__(self, database: Database, quota: StorageQuota) -> None:
        """`quota` knows of which jobs the pictures are still kept."""
        self._database = database
        self._quota = quota

    def delete(self, tenant: str, job_id: str, idempotency_key: str = "") -> DeletedJob:
        """Remove a job that does not run; the caller then removes its folder, also after a repetition with a key.

        Raises NotFound (FINE_TUNE_NOT_FOUND), FailedPrecondition (FINE_TUNE_RUNNING) and AlreadyExists
        (IDEMPOTENCY_CONFLICT).
        """
        key = (tenant, DELETE_METHOD, idempotency_key, hash_request([job_id.encode()]))
        with self._database.write() as connection:
            known = recall(connection, *key)
            if known is not None:
                return DeletedJob(**known)
            job = own_job(connection, tenant, job_id, locked=True)
            if job.state is JobState.RUNNING:
                raise FailedPrecondition(
                    Reason.FINE_TUNE_RUNNING,
                    f"job {job_id} is running; allowed: jobs that wait or have ended. Cancel it, and delete it once it "
                    "has stopped.",
                    metadata={"job": job_id},
                )
            mine = jobs.c.job_id == job_id
            kept = connection.scalar(select(jobs.c.picture_bytes).where(mine, pictures_there(connection, self._quota)))
            events = connection.scalar(select(func.count()).where(job_events.c.job_id == job_id))
            connection.execute(delete(jobs).where(mine))
            deleted = DeletedJob(events or 0, kept or 0)
            remember(connection, *key, asdict(deleted))
            return deleted


def delete_jobs_of(connection: Connection, tenant: str, adapter_id: str) -> tuple[str, ...]:
    """Remove the ended jobs that were to make an adapter. Returns their ids; their folders are the caller's to remove.

    One that waits or runs stays: it will make the adapter anew.
    """
    ended = [state.value for state in JobState if state.ended]
    theirs = (jobs.c.tenant == tenant) & (jobs.c.adapter_id == adapter_id) & jobs.c.state.in_(ended)
    return tuple(connection.scalars(delete(jobs).where(theirs).returning(jobs.c.job_id)))
