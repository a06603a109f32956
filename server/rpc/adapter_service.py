"""AdapterService: the adapters of the caller's tenant. The store decides; here are messages, threads and the engine."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
import structlog

from hueshift.adapters.errors import InvalidArgument, NotFound
from hueshift.adapters.formats.draft import ImportBase
from hueshift.adapters.layout import BaseLayout
from hueshift.server.clock import Clock
from hueshift.server.file_threads import FileThreads
from hueshift.server.logs import tenant_hash
from hueshift.server.pins import Mix, Pins
from hueshift.server.rpc.adapter_changes import AdapterChanges, Deletion, Imported
from hueshift.server.rpc.adapter_import import AdapterFormats, is_own_form
from hueshift.server.rpc.adapter_messages import to_message
from hueshift.server.rpc.adapter_upload import MAX_CHUNK, Upload, receive_upload
from hueshift.server.rpc.call import current_call
from hueshift.server.rpc.names import adapter_name, parse_adapter_name
from hueshift.server.settings import LimitSettings
from hueshift.server.store.adapter_records import AdapterRecord, RevisionRecord
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.v1 import adapters_pb2 as pb
from hueshift.v1 import adapters_pb2_grpc

T = TypeVar("T")


class Residents(Protocol):
    """The part of the scheduler that is needed here; called in the event loop, never blocks it."""

    async def warm(self, mix: Mix, pin: bool | None) -> bool:
        """Load the row of a mix; True pins it, False unpins it, None leaves its pin. True if it was not resident."""
        ...

    def drop_adapter(self, name: str, hashes: Sequence[str]) -> None:
        """Stop serving an adapter at once: requests that run with it end with ADAPTER_DELETED."""
        ...

    def resident(self, content_hash: str) -> bool:
        """Return True while a row made of that file is loaded."""
        ...


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Brings adapters in and out, and keeps them ready.

    Without `formats`, which know the base model's weights, files that are defined against those are refused. `end_job`
    removes the files of a fine-tuning job that went with its adapter.
    """

    def __init__(
        self,
        store: AdapterStore,
        layout: BaseLayout,
        limits: LimitSettings,
        scheduler: Residents,
        clock: Clock,
        formats: AdapterFormats | None = None,
        end_job: Callable[[str], object] = lambda job_id: None,
        files: FileThreads | None = None,
    ) -> None:
        self._store = store
        # What reads and writes adapter files waits there.
        self._files = files or FileThreads()
        self._layout = layout
        self._formats = formats or AdapterFormats(ImportBase(layout))
        self._changes = AdapterChanges(store, self._formats, layout, limits, end_job)
        self._limits = limits
        self._scheduler = scheduler
        self.pins = Pins(store, scheduler)
        self._clock = clock
        self._log = structlog.get_logger()
        self._unfinished: set[asyncio.Task[Any]] = set()

    async def ImportAdapter(
        self,
        request_iterator: AsyncIterator[pb.ImportAdapterRequest],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> pb.ImportAdapterResponse:
        """Store an adapter file; see the contract."""
        tenant = current_call().tenant
        admit = partial(self._changes.admit, tenant)
        upload = await receive_upload(request_iterator, self._store, self._limits.max_adapter_bytes, admit)
        imported = await self._to_the_end(self._import(tenant, upload))
        return pb.ImportAdapterResponse(
            adapter=self._message(imported.record), replayed=imported.replayed, report=imported.report
        )

    async def ExportAdapter(
        self, request: pb.ExportAdapterRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.ExportAdapterResponse]:
        """Return the record, then the file; see the contract."""
        tenant = current_call().tenant
        record, revision = await asyncio.to_thread(self._find, tenant, request.name, request.revision)
        if not is_own_form(request.format):
            data = await self._files.run(self._convert, revision.content_hash, request)
            yield pb.ExportAdapterResponse(adapter=self._message(record))
            for begin in range(0, len(data), MAX_CHUNK):
                yield pb.ExportAdapterResponse(chunk=data[begin : begin + MAX_CHUNK])
            return
        with await self._files.run(self._store.open_file, revision.content_hash) as file:
            yield pb.ExportAdapterResponse(adapter=self._message(record))
            while chunk := await self._files.run(file.read, MAX_CHUNK):
                yield pb.ExportAdapterResponse(chunk=chunk)

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetAdapterResponse:
        """Return a record."""
        tenant = current_call().tenant
        adapter_id = parse_adapter_name(request.name, tenant)
        record = await asyncio.to_thread(self._store.get, tenant, adapter_id)
        return pb.GetAdapterResponse(adapter=self._message(record))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ListAdaptersResponse:
        """Return a page of records, newest first."""
        page = await asyncio.to_thread(
            self._store.list, current_call().tenant, request.page_size, request.page_token, dict(request.labels)
        )
        messages = [self._message(record) for record in page.adapters]
        return pb.ListAdaptersResponse(adapters=messages, next_page_token=page.next_token)

    async def UpdateAdapter(
        self, request: pb.UpdateAdapterRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.UpdateAdapterResponse:
        """Change the display name or the labels."""
        record = await asyncio.to_thread(self._changes.update, current_call().tenant, request)
        return pb.UpdateAdapterResponse(adapter=self._message(record))

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.DeleteAdapterResponse:
        """Remove an adapter and stop serving it."""
        deletion = await self._to_the_end(self._delete(current_call().tenant, request))
        deleted = deletion.deleted
        return pb.DeleteAdapterResponse(revisions=deleted.revisions, bytes=deleted.bytes, fine_tunes=len(deleted.jobs))

    async def CombineAdapters(
        self, request: pb.CombineAdaptersRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.CombineAdaptersResponse:
        """Make an adapter of others; see the contract."""
        combined = await self._to_the_end(self._combine(current_call().tenant, request))
        return pb.CombineAdaptersResponse(
            adapter=self._message(combined.record), replayed=combined.replayed, notes=combined.notes
        )

    async def GetStorage(
        self, request: pb.GetStorageRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetStorageResponse:
        """Return what the tenant stores, and how much it may."""
        tenant, storage = current_call().tenant, self._store.storage
        used = await asyncio.to_thread(storage.usage, tenant)
        limit = storage.quota.of(tenant)
        return pb.GetStorageResponse(adapter_bytes=used.adapters, picture_bytes=used.pictures, limit_bytes=limit)

    async def WarmAdapter(
        self, request: pb.WarmAdapterRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.WarmAdapterResponse:
        """Load an adapter's row, and pin or unpin it."""
        tenant = current_call().tenant
        pin = request.pin if request.HasField("pin") else None
        record, revision = await asyncio.to_thread(self._find, tenant, request.name, request.revision)
        if pin is not None and revision.revision != record.revision:
            raise InvalidArgument.for_field(
                "revision", f"{request.revision} given with a pin; allowed: 0 or {record.revision}, the newest"
            )
        return await self._to_the_end(self._warm(record, revision, pin))

    def _message(self, record: AdapterRecord) -> pb.Adapter:
        return to_message(record, resident=self._scheduler.resident(record.newest.content_hash))

    def _find(self, tenant: str, name: str, number: int) -> tuple[AdapterRecord, RevisionRecord]:
        adapter_id = parse_adapter_name(name, tenant)
        if number < 0:
            raise InvalidArgument.for_field("revision", f"{number} given; allowed: 0 (the newest) or a number from 1")
        record = self._store.get(tenant, adapter_id)
        if number in (0, record.revision):
            return record, record.newest
        return record, self._store.revision(tenant, adapter_id, number)

    def _convert(self, content_hash: str, request: pb.ExportAdapterRequest) -> bytes:
        adapter = self._store.load(content_hash, self._layout)
        return self._formats.write(adapter, request.format, partial=request.partial)

    async def _import(self, tenant: str, upload: Upload) -> Imported:
        started = self._clock.monotonic()
        imported = await self._files.run(self._changes.store_upload, tenant, upload)
        await self._stored("adapter imported", imported, started)
        return imported

    async def _combine(self, tenant: str, request: pb.CombineAdaptersRequest) -> Imported:
        started = self._clock.monotonic()
        combined = await self._files.run(self._changes.combine, tenant, request)
        await self._stored("adapters combined", combined, started)
        return combined

    async def _stored(self, event: str, stored: Imported, started: float) -> None:
        record, before = stored.record, stored.before
        if before is not None and before.pinned and before.newest.content_hash != record.newest.content_hash:
            # The pin is the adapter's, so it moves to the new revision.
            await self.pins.follow()
        self._log.info(
            event,
            tenant_hash=tenant_hash(record.tenant),
            revision=record.revision,
            size_bytes=record.newest.size_bytes,
            replayed=stored.replayed,
            seconds=round(self._clock.monotonic() - started, 3),
        )

    async def _delete(self, tenant: str, request: pb.DeleteAdapterRequest) -> Deletion:
        deletion = await asyncio.to_thread(self._changes.delete, tenant, request)
        if not deletion.replayed:
            # Before the files go, so that nothing starts to load one that is about to vanish.
            self._scheduler.drop_adapter(adapter_name(tenant, deletion.adapter_id), deletion.deleted.hashes)
        await self._files.run(self._changes.discard_files, deletion)
        self._log.info(
            "adapter deleted",
            tenant_hash=tenant_hash(tenant),
            revisions=deletion.deleted.revisions,
            freed_bytes=deletion.deleted.bytes,
            jobs=len(deletion.deleted.jobs),
            replayed=deletion.replayed,
        )
        return deletion

    async def _warm(self, record: AdapterRecord, revision: RevisionRecord, pin: bool | None) -> pb.WarmAdapterResponse:
        # Unpinning is left to `pins`, which knows whether another adapter has the same file pinned.
        loaded = await self._scheduler.warm(((revision.content_hash, 1.0),), pin or None)
        key = (record.tenant, record.adapter_id)
        try:
            if pin:
                write = partial(asyncio.to_thread, self._store.set_pinned, *key, True)
                record = await self.pins.note((*key, revision.content_hash), write)
            elif pin is not None:
                record = await asyncio.to_thread(self._store.set_pinned, *key, False)
                await self.pins.follow()
        except NotFound:
            # Deleted while it was loading: the pin must not keep it.
            self._scheduler.drop_adapter(adapter_name(*key), [revision.content_hash])
            raise
        return pb.WarmAdapterResponse(adapter=self._message(record), loaded=loaded)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end even if the caller leaves: rows that are gone must not stay served, nor files stay behind."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._unfinished.discard(task)
        # Read, so that an error whose caller has left is not reported as forgotten; the caller, if there, raises it.
        if not task.cancelled() and task.exception() is not None:
            self._log.info("change of an adapter failed", error=type(task.exception()).__name__)
