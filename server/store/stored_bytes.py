"""What a tenant keeps on our disks, adapter files and pictures of jobs, and the most it may.

Counted from the rows, not from the disk: of adapters each distinct file once, of jobs the pictures and masks for as
long as the job needs them. Checkpoints are not counted: they are ours, few, and gone with the job.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Connection, func, or_, select, true

from hueshift.adapters.errors import Reason, ResourceExhausted
from hueshift.server.store.database import Database, lock, now
from hueshift.server.store.job_records import JobState
from hueshift.server.store.job_retry import kept
from hueshift.server.store.tables import idempotency, jobs, revisions

_OPEN = (JobState.QUEUED.value, JobState.RUNNING.value)


@dataclass(frozen=True, slots=True)
class StorageQuota:
    """Bytes that each tenant may store, 0: no limit; `own` has other limits of some tenants.

    `failed_seconds` and `keep_pictures` say whose pictures are there, as the settings of training do.
    """

    most: int = 0
    own: Mapping[str, int] = field(default_factory=dict)
    failed_seconds: float = 0.0
    keep_pictures: bool = False

    def of(self, tenant: str) -> int:
        """Return the limit of a tenant."""
        return self.own.get(tenant, self.most)


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that are stored."""

    adapters: int
    pictures: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.adapters + self.pictures


class Storage:
    """Looks at what tenants store. Synchronous, safe for several threads and processes."""

    def __init__(self, database: Database, quota: StorageQuota) -> None:
        self._database = database
        self.quota = quota

    def usage(self, tenant: str) -> Stored:
        """Return what a tenant stores."""
        with self._database.read() as connection:
            return stored(connection, self.quota, tenant)

    def totals(self) -> Stored:
        """Return what all tenants store; a file that several have counts once."""
        with self._database.read() as connection:
            return stored(connection, self.quota)

    def check(self, tenant: str, added: int, method: str = "", key: str = "") -> None:
        """Raise the error of `check_storage` before a caller sends so many bytes for nothing.

        With an idempotency key that was used before it passes: the call may be a repetition, which stores nothing.
        """
        used_before = select(idempotency.c.key).where(
            idempotency.c.tenant == tenant, idempotency.c.method == method, idempotency.c.key == key
        )
        with self._database.read() as connection:
            if not key or connection.scalar(used_before) is None:
                check_storage(connection, self.quota, tenant, added, exact=False)


def check_storage(connection: Connection, quota: StorageQuota, tenant: str, added: int, *, exact: bool = True) -> None:
    """Raise ResourceExhausted (TENANT_STORAGE) when so many bytes more would be over the tenant's limit.

    Where it is `exact` nothing else of the tenant's can be stored until the transaction ends.
    """
    limit = quota.of(tenant)
    if not limit or added <= 0:
        return
    if exact:
        lock(connection, f"storage/{tenant}")
    used = stored(connection, quota, tenant)
    if used.total + added <= limit:
        return
    raise ResourceExhausted(
        Reason.TENANT_STORAGE,
        f"{added} more bytes asked for; you store {used.total} ({used.adapters} of adapters, {used.pictures} of "
        f"pictures of jobs); allowed: {limit} in all. Delete adapters that are not needed, or failed jobs.",
        metadata={
            "quota": "tenant_stored_bytes",
            "limit": str(limit),
            "used": str(used.total),
            "asked": str(added),
        },
    )


def stored(connection: Connection, quota: StorageQuota, tenant: str | None = None) -> Stored:
    """Return what a tenant stores; None means all of them together."""
    files = select(revisions.c.content_hash, revisions.c.size_bytes).distinct()
    pictures = select(func.sum(jobs.c.picture_bytes)).where(pictures_there(connection, quota))
    if tenant is not None:
        files, pictures = files.where(revisions.c.tenant == tenant), pictures.where(jobs.c.tenant == tenant)
    adapter_bytes = connection.scalar(select(func.sum(files.subquery().c.size_bytes)))
    return Stored(int(adapter_bytes or 0), int(connection.scalar(pictures) or 0))


def pictures_there(connection: Connection, quota: StorageQuota) -> ColumnElement[bool]:
    """The jobs whose pictures are kept, as a condition of a query."""
    if quota.keep_pictures:
        return true()
    return or_(jobs.c.state.in_(_OPEN), kept(quota.failed_seconds, now(connection)))
