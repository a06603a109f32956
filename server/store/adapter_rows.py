"""Rows of the adapter tables, read into records."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, select

from hueshift.server.store.adapter_records import AdapterRecord, RevisionRecord
from hueshift.server.store.tables import adapters, revisions

_RECORD_COLUMNS = (
    adapters.c.tenant,
    adapters.c.adapter_id,
    adapters.c.display_name,
    adapters.c.labels,
    adapters.c.pinned,
    adapters.c.created.label("first_created"),
    adapters.c.updated,
    *(column for column in revisions.c if column.name not in ("tenant", "adapter_id")),
)


def newest() -> Select[Any]:
    """The query for adapters with their newest revision; `read_adapter_row` reads its rows."""
    same = and_(
        revisions.c.tenant == adapters.c.tenant,
        revisions.c.adapter_id == adapters.c.adapter_id,
        revisions.c.revision == adapters.c.revision,
    )
    return select(*_RECORD_COLUMNS).join_from(adapters, revisions, same)


def pinned() -> Select[Any]:
    """The same for the pinned ones of all tenants, oldest first."""
    return newest().where(adapters.c.pinned.is_(True)).order_by(adapters.c.created, adapters.c.adapter_id)


def read_adapter_row(row: Row[Any]) -> AdapterRecord:
    """Build the record from a row of `newest`."""
    return AdapterRecord(
        tenant=row.tenant,
        adapter_id=row.adapter_id,
        display_name=row.display_name,
        labels=row.labels,
        pinned=row.pinned,
        created=row.first_created,
        updated=row.updated,
        newest=read_revision(row),
    )


def published_by(connection: Connection, job_id: str) -> RevisionRecord | None:
    """Return the revision that a job published, if it did."""
    if not job_id:
        return None
    row = connection.execute(select(revisions).where(revisions.c.job_id == job_id)).one_or_none()
    return None if row is None else read_revision(row)


def referenced(connection: Connection, hashes: Sequence[str]) -> set[str]:
    """Return those of the content hashes that a revision of any tenant names."""
    return set(
        connection.execute(
            select(revisions.c.content_hash).where(revisions.c.content_hash.in_(hashes)).distinct()
        ).scalars()
    )


def read_revision(row: Row[Any]) -> RevisionRecord:
    """Build the record from a row of the revisions table, or one joined with it."""
    data = row._mapping
    return RevisionRecord(
        tenant=data["tenant"],
        adapter_id=data["adapter_id"],
        revision=data["revision"],
        content_hash=data["content_hash"],
        base_hash=data["base_hash"],
        kind=data["kind"],
        method=data["method"],
        identifier=data["identifier"],
        size_bytes=data["size_bytes"],
        job_id=data["job_id"] or "",
        created=data["created"],
    )
