"""The events of a job, numbered without gaps: each is written in the transaction of the change it tells of.

While a job goes on none is deleted, so that a watcher can trust the numbers. They stay few all the same: the worker
writes at most 1,000 progress events an attempt, and only the newest samples keep their picture. Long after the job has
ended all but its changes of state may go (`retention`).
"""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection, func, insert, select, tuple_, update

from hueshift.server.store.job_records import EventKind, JobEvent, JobRecord
from hueshift.server.store.tables import job_events, jobs

# A 128-pixel PNG takes about 20 kB, a 768-pixel one 1 MB: 64 MB a job at worst.
KEPT_SAMPLES = 64
# Pictures that one reader holds at a time, or one of them where it is larger: a watcher that starts anew and reads
# slowly would else hold all of a job, and may be one of thousands.
READ_BYTES = 2 * 1024 * 1024


def append_event(
    connection: Connection,
    job: JobRecord,
    time: float,
    kind: EventKind,
    payload: Mapping[str, Any],
    data: bytes | None = None,
) -> None:
    """Write the event numbered `job.sequence`. The caller raised that number in this transaction."""
    connection.execute(
        insert(job_events).values(
            job_id=job.job_id, sequence=job.sequence, time=time, kind=kind.value, payload=dict(payload), data=data
        )
    )
    if kind is EventKind.SAMPLE:
        _drop_old_samples(connection, job.job_id)


def read_events(connection: Connection, job_id: str, after: int, limit: int) -> list[JobEvent]:
    """Return at most `limit` events numbered above `after`, in order; at least one if there is any, and no more than
    READ_BYTES of pictures beyond that.
    """
    mine = (job_events.c.job_id == job_id) & (job_events.c.sequence > after)
    # The length of a picture is read without the picture itself.
    size = func.coalesce(func.length(job_events.c.data), 0)
    found = connection.execute(select(job_events.c.sequence, size).where(mine).order_by("sequence").limit(limit)).all()
    last, total = after, 0
    for sequence, nbytes in found:
        total += nbytes
        if total > READ_BYTES and last > after:
            break
        last = sequence
    rows = connection.execute(
        select(job_events).where(mine, job_events.c.sequence <= last).order_by(job_events.c.sequence)
    )
    return [JobEvent(r.sequence, r.time, EventKind(r.kind), r.payload, r.data) for r in rows]


def read_sequences(connection: Connection, job_ids: Collection[str]) -> dict[str, int]:
    """Return the number of the last event of each job of those ids; of one that is not there, none."""
    rows = connection.execute(select(jobs.c.job_id, jobs.c.sequence).where(jobs.c.job_id.in_(job_ids)))
    return {row.job_id: row.sequence for row in rows}


def forget_samples(connection: Connection, before: float, most: int) -> int:
    """Remove the pictures of samples drawn before a time, for jobs that ended before it; at most so many.

    Returns how many.
    """
    ended = select(jobs.c.job_id).where(jobs.c.job_id == job_events.c.job_id, jobs.c.ended < before)
    key = (job_events.c.job_id, job_events.c.sequence)
    old = select(*key).where(job_events.c.data.is_not(None), job_events.c.time < before, ended.exists()).limit(most)
    return connection.execute(update(job_events).where(tuple_(*key).in_(old)).values(data=None)).rowcount


def _drop_old_samples(connection: Connection, job_id: str) -> None:
    samples = (job_events.c.job_id == job_id, job_events.c.kind == EventKind.SAMPLE.value)
    oldest_kept = connection.scalar(
        select(job_events.c.sequence)
        .where(*samples)
        .order_by(job_events.c.sequence.desc())
        .offset(KEPT_SAMPLES - 1)
        .limit(1)
    )
    if oldest_kept is not None:
        connection.execute(
            update(job_events)
            .where(*samples, job_events.c.sequence < oldest_kept, job_events.c.data.is_not(None))
            .values(data=None)
        )
