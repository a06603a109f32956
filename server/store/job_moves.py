"""The steps that every change of the job table is made of: find a row, hold it, move it, write its event."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select, update

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.server.rpc.names import not_found
from hueshift.server.store.job_events import append_event
from hueshift.server.store.job_records import EventKind, JobRecord, JobState, Lease
from hueshift.server.store.tables import jobs

_NO_LEASE: Mapping[str, Any] = {"lease_owner": None, "lease_expires": None, "charged": None}


def own_job(connection: Connection, tenant: str, job_id: str, *, locked: bool = False) -> JobRecord:
    """Return a job of the tenant, its row locked if asked. Raises NotFound (FINE_TUNE_NOT_FOUND)."""
    query = select(jobs).where(jobs.c.job_id == job_id, jobs.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if locked else query).one_or_none()
    if row is None:
        raise not_found(Reason.FINE_TUNE_NOT_FOUND, "fineTunes", job_id)
    return JobRecord.from_row(row)


def held_job(connection: Connection, lease: Lease) -> JobRecord:
    """Return the job of a lease that is still held, its row locked. Raises FailedPrecondition (LEASE_LOST)."""
    query = select(jobs).where(
        jobs.c.job_id == lease.job_id,
        jobs.c.fencing_token == lease.token,
        jobs.c.state == JobState.RUNNING.value,
    )
    row = connection.execute(query.with_for_update()).one_or_none()
    if row is None:
        raise FailedPrecondition(
            Reason.LEASE_LOST,
            f"job {lease.job_id} is no longer held under token {lease.token}: it ended or was given to another",
        )
    return JobRecord.from_row(row)


def move_job(connection: Connection, job: JobRecord, state: JobState, now: float, **changes: Any) -> JobRecord:
    """Bring a job into a state, with other changes of its row, and write the event of it."""
    if state is not JobState.RUNNING:
        changes = {**changes, **_NO_LEASE}
    if state.ended:
        changes["ended"] = now
    moved = change_job(connection, job.job_id, state=state.value, sequence=jobs.c.sequence + 1, **changes)
    append_event(connection, moved, now, EventKind.STATE, moved.snapshot())
    return moved


def change_job(connection: Connection, job_id: str, **changes: Any) -> JobRecord:
    """Change columns of a job's row."""
    query = update(jobs).where(jobs.c.job_id == job_id).values(changes).returning(*jobs.c)
    return JobRecord.from_row(connection.execute(query).one())
