"""What nobody will ask for again, a few rows at a time: events of training, ended jobs, revisions that were replaced.

Each function makes one short transaction's worth of changes. Rows go before files: whoever calls removes the files
that it is told of once the rows are committed, and a crash in between leaves files that the sweeps of both stores find.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from sqlalchemy import Connection, delete, func, literal_column, or_, select, tuple_

from hueshift.server.store.database import Database, in_batches, lock, now
from hueshift.server.store.job_retry import kept
from hueshift.server.store.tables import adapters, job_events, jobs, revisions

AdapterKey = tuple[str, str]
"""Tenant and adapter id."""


@dataclass(frozen=True, slots=True)
class RevisionRule:
    """Which revisions go: all but the newest `most` of an adapter, and those older than `seconds`; 0: not for that.

    Never the newest, nor one that was the newest, or was named by a request, less than `unused` seconds ago: a request
    that began with it may not have read its file yet.
    """

    most: int = 0
    seconds: float = 0.0
    unused: float = 3600.0


def forget_events(connection: Connection, before: float, most: int) -> int:
    """Remove progress and samples from before a time, of jobs that ended before it; at most so many. Returns how many.

    The changes of state stay with their job, the last of which ends a watch.
    """
    ended = select(jobs.c.job_id).where(jobs.c.job_id == job_events.c.job_id, jobs.c.ended < before)
    key = (job_events.c.job_id, job_events.c.sequence)
    # A literal, since no database sees that a parameter agrees with a partial index.
    loose = job_events.c.kind != literal_column("'state'")
    old = select(*key).where(loose, job_events.c.time < before, ended.exists()).limit(most)
    return connection.execute(delete(job_events).where(tuple_(*key).in_(old))).rowcount


def forget_jobs(connection: Connection, before: float, keep_failed: float, most: int) -> list[str]:
    """Remove jobs that ended before a time, with what is left of their events; at most so many. Returns their ids.

    Those that may still be retried, for `keep_failed` seconds, stay.
    """
    old = select(jobs.c.job_id).where(jobs.c.ended < before, ~kept(keep_failed, now(connection)))
    found = list(connection.scalars(old.order_by(jobs.c.ended).limit(most).with_for_update(skip_locked=True)))
    connection.execute(delete(jobs).where(jobs.c.job_id.in_(found)))
    return found


def crowded_adapters(
    connection: Connection, rule: RevisionRule, after: AdapterKey | None, most: int
) -> list[AdapterKey]:
    """Return at most so many adapters that may have revisions to lose, in order, following `after`."""
    key = (revisions.c.tenant, revisions.c.adapter_id)
    asked = []
    if rule.most:
        asked.append(func.count() > rule.most)
    if rule.seconds:
        asked.append(func.min(revisions.c.created) < now(connection) - rule.seconds)
    if not asked:
        return []
    query = select(*key).group_by(*key).having(func.count() > 1, or_(*asked)).order_by(*key).limit(most)
    if after is not None:
        query = query.where(tuple_(*key) > after)
    return [(row.tenant, row.adapter_id) for row in connection.execute(query)]


def forget_revisions(connection: Connection, key: AdapterKey, rule: RevisionRule, most: int) -> tuple[str, ...]:
    """Remove revisions of an adapter by the rule, oldest first, looking at no more than so many.

    Returns the content hash of each, for `AdapterStore.discard_unused`.
    """
    tenant, adapter_id = key
    lock(connection, f"adapter/{tenant}/{adapter_id}")
    mine = (revisions.c.tenant == tenant) & (revisions.c.adapter_id == adapter_id)
    newest = connection.scalar(
        select(adapters.c.revision).where(adapters.c.tenant == tenant, adapters.c.adapter_id == adapter_id)
    )
    count = connection.scalar(select(func.count()).where(mine)) or 0
    rows = connection.execute(
        select(revisions.c.revision, revisions.c.created).where(mine).order_by(revisions.c.revision).limit(most + 1)
    ).all()
    time = now(connection)
    spent = []
    for index, (row, successor) in enumerate(pairwise(rows)):
        surplus = bool(rule.most) and count - index > rule.most
        aged = bool(rule.seconds) and row.created < time - rule.seconds
        if row.revision != newest and (surplus or aged) and successor.created <= time - rule.unused:
            spent.append(row.revision)
    # Asked as a part of the deletion: a request may be naming one of them at this moment.
    idle = or_(revisions.c.used.is_(None), revisions.c.used <= time - rule.unused)
    gone = delete(revisions).where(mine, revisions.c.revision.in_(spent), idle).returning(revisions.c.content_hash)
    return tuple(connection.execute(gone).scalars())


def known_jobs(database: Database, job_ids: Collection[str]) -> set[str]:
    """Return those of the ids that there is a job of. Raises Unavailable (STORE_UNAVAILABLE)."""
    found = set[str]()
    for some in in_batches(job_ids):
        with database.read() as connection:
            found.update(connection.scalars(select(jobs.c.job_id).where(jobs.c.job_id.in_(some))))
    return found
