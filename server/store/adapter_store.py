"""The adapters of every tenant: rows in the database, files in the blob store.

A file is whole on disk before a row names it, and rows go before their files do, so a crash leaves at most files that
no row names; `sweep_orphans` removes those. A file may serve several revisions, of several tenants, when their bytes
are equal: it goes with the last of them. Files get their name and are removed only inside a writing transaction that
holds the file's lock, so a publication and a deletion of equal bytes cannot pass each other.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, insert, or_, select
from sqlalchemy import delete as delete_from
from sqlalchemy import update as update_of

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import HueshiftError, Internal, NotFound, Reason
from hueshift.adapters.file import read_adapter
from hueshift.adapters.layout import BaseLayout
from hueshift.adapters.validate import FileLimits
from hueshift.server.clock import Clock
from hueshift.server.rpc.names import adapter_name, check_id, not_found
from hueshift.server.rpc.pages import check_page_size, decode_token, encode_token
from hueshift.server.store.adapter_records import (
    AdapterPage,
    AdapterRecord,
    DeletedAdapter,
    RevisionRecord,
    check_display_name,
    check_labels,
)
from hueshift.server.store.adapter_rows import newest, pinned, published_by, read_adapter_row, read_revision, referenced
from hueshift.server.store.blobs import BlobStore, BlobWriter, StagedBlob
from hueshift.server.store.database import Database, in_batches, lock
from hueshift.server.store.job_removal import delete_jobs_of
from hueshift.server.store.stored_bytes import Storage, StorageQuota
from hueshift.server.store.tables import adapters, revisions

_CHUNK = 1024 * 1024
# A request that names an old revision writes this seldom; what removes revisions waits much longer.
USE_SECONDS = 300.0


class AdapterStore:
    """Adapters and their files. Synchronous, safe for several threads and processes.

    Methods that name an adapter raise NotFound (ADAPTER_NOT_FOUND) when the tenant has none of that id.
    """

    def __init__(self, database: Database, blobs: BlobStore, clock: Clock, quota: StorageQuota | None = None) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self.storage = Storage(database, quota or StorageQuota())

    @contextmanager
    def write(self, connection: Connection | None = None) -> Iterator[Connection]:
        """Give the caller's writing transaction, or a new one: several changes then stand or fall together."""
        if connection is not None:
            yield connection
            return
        with self._database.write() as own:
            yield own

    def upload(self) -> BlobWriter:
        """Begin a file that arrives piece by piece; what it becomes may be given to `publish`."""
        return self._blobs.writer()

    def stage(self, pieces: Iterable[bytes | memoryview]) -> StagedBlob:
        """Write a file before the transaction that publishes it, which others wait for. `discard` it at the end."""
        return self._blobs.stage(pieces)

    def discard(self, staged: StagedBlob) -> None:
        """Remove a staged file that was not published; harmless after that."""
        self._blobs.discard(staged)

    def get(self, tenant: str, adapter_id: str, connection: Connection | None = None) -> AdapterRecord:
        """Return an adapter with its newest revision."""
        query = newest().where(adapters.c.tenant == tenant, adapters.c.adapter_id == adapter_id)
        if connection is not None:
            row = connection.execute(query).one_or_none()
        else:
            with self._database.read() as own:
                row = own.execute(query).one_or_none()
        if row is None:
            raise _no_adapter(tenant, adapter_id)
        return read_adapter_row(row)

    def revision(self, tenant: str, adapter_id: str, number: int = 0) -> RevisionRecord:
        """Return a revision; 0 means the newest. An older one is kept for a while from now on.

        Raises NotFound (ADAPTER_REVISION_NOT_FOUND) on any other number.
        """
        record = self.get(tenant, adapter_id)
        if number in (0, record.revision):
            return record.newest
        same = and_(
            revisions.c.tenant == tenant,
            revisions.c.adapter_id == adapter_id,
            # No database holds larger numbers, and some refuse to compare with them.
            revisions.c.revision == min(max(number, -1), 2**62),
        )
        with self._database.read() as connection:
            row = connection.execute(select(revisions).where(same)).one_or_none()
        if row is None or not self._note_use(row.used, same):
            error = not_found(Reason.ADAPTER_NOT_FOUND, "adapters", adapter_name(tenant, adapter_id))
            raise NotFound(
                Reason.ADAPTER_REVISION_NOT_FOUND,
                f"adapter {adapter_name(tenant, adapter_id)!r} has no revision {number}; "
                f"allowed: 0 (the newest) or 1 to {record.revision}, of which the server may have removed old ones",
                resource=error.resource,
            )
        return read_revision(row)

    def list(
        self, tenant: str, page_size: int = 0, token: str = "", labels: Mapping[str, str] | None = None
    ) -> AdapterPage:
        """Return a page of the tenant's adapters, newest first, that carry all of `labels`.

        A page follows the last row of the page before, so adapters stored meanwhile neither repeat nor hide any.
        Raises InvalidArgument on a wrong page size, token or label.
        """
        size = check_page_size(page_size)
        after = decode_token(token)
        query = newest().where(adapters.c.tenant == tenant)
        for key, value in check_labels(labels or {}).items():
            query = query.where(adapters.c.labels[key].as_string() == value)
        if after is not None:
            created, key = after
            query = query.where(
                or_(adapters.c.created < created, and_(adapters.c.created == created, adapters.c.adapter_id < key))
            )
        query = query.order_by(adapters.c.created.desc(), adapters.c.adapter_id.desc()).limit(size + 1)
        with self._database.read() as connection:
            records = [read_adapter_row(row) for row in connection.execute(query)]
        page = tuple(records[:size])
        return AdapterPage(page, encode_token(page[-1].created, page[-1].adapter_id) if len(records) > size else "")

    def pinned(self) -> tuple[AdapterRecord, ...]:
        """Return the pinned adapters of all tenants, oldest first; servers look every few seconds."""
        with self._database.read() as connection:
            return tuple(read_adapter_row(row) for row in connection.execute(pinned()))

    def publish(
        self,
        tenant: str,
        adapter_id: str,
        display_name: str,
        labels: Mapping[str, str],
        data: bytes | StagedBlob,
        adapter: Adapter,
        job_id: str = "",
        connection: Connection | None = None,
    ) -> RevisionRecord:
        """Store a validated file, `data` being the bytes that hold `adapter`, as a new adapter or its next revision.

        An empty display name or no labels keep what the adapter has. With `connection` the rows are written in the
        caller's transaction. A job publishes once: a second call with its id returns the first call's revision.
        """
        check_id(tenant, "tenant")
        check_id(adapter_id, "adapter_id")
        check_display_name(display_name)
        check_labels(labels)
        staged = data if isinstance(data, StagedBlob) else self._blobs.stage(data)
        try:
            with self.write(connection) as own:
                lock(own, f"adapter/{tenant}/{adapter_id}")
                done = published_by(own, job_id)
                if done is not None:
                    return done
                lock(own, f"blob/{staged.content_hash}")
                self._blobs.commit(staged)
                number = self._write_adapter(own, tenant, adapter_id, display_name, labels)
                return self._write_revision(own, tenant, adapter_id, number, staged, adapter, job_id)
        finally:
            self._blobs.discard(staged)

    def update(
        self,
        tenant: str,
        adapter_id: str,
        *,
        display_name: str | None = None,
        labels: Mapping[str, str] | None = None,
        connection: Connection | None = None,
    ) -> AdapterRecord:
        """Change what is given and return the record."""
        values: dict[str, Any] = {}
        if display_name is not None:
            values["display_name"] = check_display_name(display_name) or adapter_id
        if labels is not None:
            values["labels"] = check_labels(labels)
        return self._change(tenant, adapter_id, values, connection)

    def set_pinned(self, tenant: str, adapter_id: str, pinned: bool) -> AdapterRecord:
        """Remember whether the adapter is pinned and return the record."""
        return self._change(tenant, adapter_id, {"pinned": pinned}, None)

    def delete(self, tenant: str, adapter_id: str) -> DeletedAdapter:
        """Remove an adapter, its revisions and the files that nothing else uses, at once."""
        with self._database.write() as connection:
            deleted = self.delete_rows(connection, tenant, adapter_id)
        self.discard_unused(deleted.hashes)
        return deleted

    def delete_rows(self, connection: Connection, tenant: str, adapter_id: str) -> DeletedAdapter:
        """Remove the rows in the caller's transaction, who calls `discard_unused` with the hashes once it is committed.

        The adapter's ended jobs go too: what they learned from is what it shows. Files cannot go before: a rollback
        would leave rows without them.
        """
        lock(connection, f"adapter/{tenant}/{adapter_id}")
        self.get(tenant, adapter_id, connection)
        mine = and_(revisions.c.tenant == tenant, revisions.c.adapter_id == adapter_id)
        sizes = {
            row.content_hash: row.size_bytes
            for row in connection.execute(select(revisions.c.content_hash, revisions.c.size_bytes).where(mine))
        }
        count = connection.execute(delete_from(revisions).where(mine)).rowcount
        connection.execute(
            delete_from(adapters).where(adapters.c.tenant == tenant, adapters.c.adapter_id == adapter_id)
        )
        kept = referenced(connection, tuple(sizes))
        freed = sum(size for content_hash, size in sizes.items() if content_hash not in kept)
        return DeletedAdapter(count, freed, tuple(sorted(sizes)), delete_jobs_of(connection, tenant, adapter_id))

    def discard_unused(self, hashes: Sequence[str]) -> int:
        """Remove those of the files that no revision names. Returns the bytes freed."""
        freed = 0
        for content_hash in hashes:
            with self._database.write() as connection:
                lock(connection, f"blob/{content_hash}")
                if not referenced(connection, (content_hash,)):
                    freed += self._blobs.delete(content_hash)
        return freed

    def sweep_orphans(self, min_age: float) -> int:
        """Remove what a crash left: files that no revision names and temporary files, older than `min_age` seconds.

        `min_age` must be longer than an upload takes, whose temporary file would go too: an hour is. Returns the bytes
        freed.
        """
        freed = self._blobs.sweep_temporaries(min_age)
        old = (entry.content_hash for entry in self._blobs.entries() if entry.age >= min_age)
        for some in in_batches(old):
            with self._database.read() as connection:
                named = referenced(connection, some)
            freed += self.discard_unused([content_hash for content_hash in some if content_hash not in named])
        return freed

    def load(self, content_hash: str, layout: BaseLayout) -> Adapter:
        """Read a stored file into memory, checked against its hash and the base model.

        Raises NotFound (ADAPTER_DELETED) once no revision names it, Internal (STORE_DAMAGED) when the file on disk is
        missing or damaged, FailedPrecondition (ADAPTER_BASE_MISMATCH) when it belongs to another base model.
        """
        with self.open_file(content_hash) as file:
            try:
                return read_adapter(file, layout, FileLimits(max_bytes=file.seek(0, io.SEEK_END)))
            except HueshiftError as error:
                if error.reason is Reason.ADAPTER_BASE_MISMATCH:
                    raise
                raise _damaged(content_hash, f"it no longer passes validation: {error.message}") from error

    def open_file(self, content_hash: str) -> io.BufferedReader:
        """Open a stored file, at its beginning and after checking its hash. It stays readable if it is deleted.

        Raises NotFound (ADAPTER_DELETED) and Internal (STORE_DAMAGED) as `load`.
        """
        try:
            file = self._blobs.open(content_hash)
        except FileNotFoundError as error:
            with self._database.read() as connection:
                if referenced(connection, (content_hash,)):
                    raise _damaged(content_hash, "it is missing") from error
            raise NotFound(Reason.ADAPTER_DELETED, "the adapter has been deleted") from error
        try:
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            if digest.hexdigest() != content_hash:
                raise _damaged(content_hash, f"its SHA-256 is now {digest.hexdigest()}")
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def _change(
        self, tenant: str, adapter_id: str, values: Mapping[str, Any], connection: Connection | None
    ) -> AdapterRecord:
        with self.write(connection) as own:
            lock(own, f"adapter/{tenant}/{adapter_id}")
            if values:
                own.execute(
                    update_of(adapters)
                    .where(adapters.c.tenant == tenant, adapters.c.adapter_id == adapter_id)
                    .values(**values, updated=self._clock.time())
                )
            return self.get(tenant, adapter_id, own)

    def _note_use(self, used: float | None, same: ColumnElement[bool]) -> bool:
        """Say that a revision is in use, if that was not said lately; False if it is gone."""
        now = self._clock.time()
        if used is not None and now - used < USE_SECONDS:
            return True
        with self._database.write() as connection:
            return connection.execute(update_of(revisions).where(same).values(used=now)).rowcount == 1

    def _write_adapter(
        self, connection: Connection, tenant: str, adapter_id: str, display_name: str, labels: Mapping[str, str]
    ) -> int:
        now = self._clock.time()
        mine = and_(adapters.c.tenant == tenant, adapters.c.adapter_id == adapter_id)
        number: int | None = connection.execute(select(adapters.c.revision).where(mine)).scalar_one_or_none()
        if number is None:
            key = {"tenant": tenant, "adapter_id": adapter_id}
            text = {"display_name": display_name or adapter_id, "labels": dict(labels)}
            connection.execute(
                insert(adapters).values(**key, **text, revision=1, pinned=False, created=now, updated=now)
            )
            return 1
        values: dict[str, Any] = {"revision": number + 1, "updated": now}
        if display_name:
            values["display_name"] = display_name
        if labels:
            values["labels"] = dict(labels)
        connection.execute(update_of(adapters).where(mine).values(**values))
        return number + 1

    def _write_revision(
        self,
        connection: Connection,
        tenant: str,
        adapter_id: str,
        number: int,
        staged: StagedBlob,
        adapter: Adapter,
        job_id: str,
    ) -> RevisionRecord:
        record = RevisionRecord(
            tenant=tenant,
            adapter_id=adapter_id,
            revision=number,
            content_hash=staged.content_hash,
            base_hash=adapter.base_hash,
            kind=adapter.kind.value,
            method=adapter.method,
            identifier=adapter.identifier,
            size_bytes=staged.size_bytes,
            job_id=job_id,
            created=self._clock.time(),
        )
        values = {column.name: getattr(record, column.name) for column in revisions.c if column.name != "used"}
        connection.execute(insert(revisions).values(**values | {"job_id": job_id or None}))
        return record


def _no_adapter(tenant: str, adapter_id: str) -> NotFound:
    return not_found(Reason.ADAPTER_NOT_FOUND, "adapters", adapter_name(tenant, adapter_id))


def _damaged(content_hash: str, what: str) -> Internal:
    return Internal(
        Reason.STORE_DAMAGED,
        f"the stored adapter file {content_hash} is damaged: {what}. Restore it from a backup, or delete the adapter "
        "and import or train it again.",
    )
