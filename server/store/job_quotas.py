"""What one tenant's jobs may take: places in the queue, devices at a time, device seconds a day."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from hueshift.adapters.errors import Reason, ResourceExhausted
from hueshift.server.store.job_records import JobRecord, JobState
from hueshift.server.store.stored_bytes import StorageQuota
from hueshift.server.store.tables import jobs, usage

DAY_SECONDS = 86400
OPEN_STATES = (JobState.QUEUED.value, JobState.RUNNING.value)
# Training on a CPU takes a minute or two: sooner than this a place rarely becomes free.
QUOTA_RETRY_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class JobQuotas:
    """Limits of each tenant; 0 means none. `running`: jobs at a time; `seconds`: device seconds in a day (UTC).

    `weights` are the tenants' shares relative to one another; a tenant not named has 1.
    """

    running: int = 0
    seconds: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    storage: StorageQuota = field(default_factory=StorageQuota)


def check_queue(connection: Connection, tenant: str, limit: int) -> None:
    """Raise ResourceExhausted (TENANT_QUOTA) when the tenant has `limit` jobs that have not ended."""
    query = select(func.count()).where(jobs.c.tenant == tenant, jobs.c.state.in_(OPEN_STATES))
    used = connection.scalar(query) or 0
    if used >= limit:
        raise ResourceExhausted(
            Reason.TENANT_QUOTA,
            f"{used} fine-tuning jobs of yours wait or run; allowed: {limit}. Wait for one to end, or cancel one.",
            metadata={"quota": "tenant_queued_jobs", "limit": str(limit), "used": str(used)},
            retry_after=QUOTA_RETRY_SECONDS,
        )


def check_seconds(connection: Connection, tenant: str, quotas: JobQuotas, now: float) -> None:
    """Raise ResourceExhausted (TENANT_QUOTA) when the tenant has used up today's device seconds."""
    if not quotas.seconds:
        return
    query = select(usage.c.device_seconds).where(usage.c.tenant == tenant, usage.c.day == day_of(now))
    used = connection.scalar(query) or 0.0
    if used >= quotas.seconds:
        raise ResourceExhausted(
            Reason.TENANT_QUOTA,
            f"your fine-tuning jobs have used {used:.0f} device seconds today; allowed: {quotas.seconds:.0f} a day. "
            "The count begins again at midnight UTC.",
            metadata={
                "quota": "tenant_training_seconds",
                "limit": f"{quotas.seconds:.0f}",
                "used": f"{used:.0f}",
            },
            retry_after=DAY_SECONDS - now % DAY_SECONDS,
        )


def day_of(now: float) -> int:
    """Return the day, in UTC, of seconds since the epoch."""
    return int(now // DAY_SECONDS)


def charge(connection: Connection, job: JobRecord, now: float, used: float | None = None) -> dict[str, float]:
    """Count the time since the last count for the tenant, and return what changes in the job's row.

    `used` are the job's device seconds in all, for jobs that share a device; None counts the whole time. The caller
    holds the job's row. What lies between the last heartbeat of a lost worker and its loss is nobody's.
    """
    if job.charged is None:
        return {}
    seconds = max(0.0, now - job.charged if used is None else used - job.device_seconds)
    # Both dialects know the clause, and SQLAlchemy's generic insert does not.
    kind = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert = kind.insert(usage).values(tenant=job.tenant, day=day_of(now), device_seconds=seconds)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=[usage.c.tenant, usage.c.day],
            set_={"device_seconds": usage.c.device_seconds + seconds},
        )
    )
    return {"device_seconds": job.device_seconds + seconds, "charged": now}


def forget_usage(connection: Connection, before: float) -> int:
    """Remove the counts of days that ended before a time. Returns how many there were."""
    return connection.execute(delete(usage).where(usage.c.day < day_of(before))).rowcount
