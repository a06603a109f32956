"""Changes of a tenant's adapters, each kept with its idempotency key in one transaction. Run in a thread."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from google.protobuf.message import Message
from sqlalchemy import Connection

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import InvalidArgument, NotFound, Reason
from hueshift.adapters.file import pack_adapter, read_adapter
from hueshift.adapters.layout import BaseLayout
from hueshift.adapters.validate import FileLimits
from hueshift.server.rpc.adapter_combination import Combination, Operand, check_combination, run_combination
from hueshift.server.rpc.adapter_import import AdapterFormats
from hueshift.server.rpc.adapter_upload import Upload
from hueshift.server.rpc.names import make_id, parse_adapter_name
from hueshift.server.settings import LimitSettings
from hueshift.server.store.adapter_records import (
    AdapterRecord,
    DeletedAdapter,
    RevisionRecord,
    check_display_name,
    check_labels,
)
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import StagedBlob
from hueshift.server.store.idempotency import check_key, hash_request, recall, remember
from hueshift.server.store.stored_bytes import check_storage
from hueshift.v1 import adapters_pb2 as pb

_IMPORT = "ImportAdapter"
_COMBINE = "CombineAdapters"
_UPDATABLE = ("display_name", "labels")
# What the contract calls the method of a file that was brought in.
_IMPORTED = "import"
# Fields of a kept answer beside the record: how a file was converted, and what keeps the engine from drawing with it.
_REPORT = "report"
_NOTES = "notes"


@dataclass(frozen=True, slots=True)
class Imported:
    """The stored adapter, what it was before (None for a new one), and whether nothing new was stored.

    `report` tells how a file of another program was converted; `notes` what to know of a combination.
    """

    record: AdapterRecord
    before: AdapterRecord | None
    replayed: bool
    report: pb.ImportReport | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _New:
    """A revision to be stored: under which id and texts, its file, what it is, and what is told of it."""

    spec: pb.ImportAdapterSpec | pb.CombineAdaptersRequest
    blob: StagedBlob
    adapter: Adapter
    report: pb.ImportReport | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Deletion:
    """An adapter whose rows are gone and whose files are to follow."""

    adapter_id: str
    deleted: DeletedAdapter
    replayed: bool


class AdapterChanges:
    """Import, combine, update and delete adapters of the base model of `layout`."""

    def __init__(
        self,
        store: AdapterStore,
        formats: AdapterFormats,
        layout: BaseLayout,
        limits: LimitSettings,
        end_job: Callable[[str], object] = lambda job_id: None,
    ) -> None:
        """`end_job` removes the files of a job whose rows are gone."""
        self._store = store
        self._end_job = end_job
        self._formats = formats
        self._layout = layout
        self._limits = limits
        self._file_limits = FileLimits(max_bytes=limits.max_adapter_bytes)

    def admit(self, tenant: str, spec: pb.ImportAdapterSpec) -> None:
        """Raise ResourceExhausted (TENANT_STORAGE) when the tenant has no room for the file that is to follow."""
        self._store.storage.check(tenant, spec.size_bytes, _IMPORT, spec.idempotency_key)

    def store_upload(self, tenant: str, upload: Upload) -> Imported:
        """Validate an uploaded file and publish it; the temporary file is gone afterwards.

        Raises what `AdapterFormats.read` raises, ResourceExhausted (TENANT_STORAGE), and AlreadyExists
        (IDEMPOTENCY_CONFLICT).
        """
        spec = upload.spec
        try:
            staged = upload.file.finish()
            request_hash = hash_request((_bytes_of(spec), staged.content_hash.encode()))
            key = (tenant, _IMPORT, spec.idempotency_key, request_hash)
            kept = self._kept(key)
            if kept is None:
                return self._publish_upload(key, spec, staged)
            return _replayed(kept)
        finally:
            upload.file.discard()

    def combine(self, tenant: str, request: pb.CombineAdaptersRequest) -> Imported:
        """Make an adapter of others and publish it.

        Raises what `check_combination` and the algebra raise, NotFound, (UPLOAD_TOO_LARGE) for a combination that is
        larger than a file may be, ResourceExhausted (TENANT_STORAGE), and AlreadyExists (IDEMPOTENCY_CONFLICT).
        """
        combination = check_combination(request, tenant, self._limits, self._layout)
        key = (tenant, _COMBINE, request.idempotency_key, hash_request((_bytes_of(request),)))
        kept = self._kept(key)
        if kept is not None:
            return _replayed(kept)
        # Of how many bytes it will be, only that it is at least one is known yet.
        self._store.storage.check(tenant, 1)
        staged = self._stage(combination, tenant)
        try:
            # What is published is read once as an upload would be, so that nothing is stored that cannot be read again.
            adapter = read_adapter(staged.file, self._layout, self._file_limits)
            return self._publish(key, _New(request, staged, adapter, notes=tuple(self._formats.unserved(adapter))))
        finally:
            self._store.discard(staged)

    def update(self, tenant: str, request: pb.UpdateAdapterRequest) -> AdapterRecord:
        """Change the fields that the mask names. Raises InvalidArgument on a wrong mask or value, NotFound."""
        adapter_id = parse_adapter_name(request.adapter.name, tenant, "adapter.name")
        paths = set(request.update_mask.paths)
        unknown = sorted(paths - set(_UPDATABLE))
        if unknown or not paths:
            given = f"{unknown[0][:80]!r}" if unknown else "no path"
            raise InvalidArgument.for_field("update_mask", f"{given} given; allowed: {' and '.join(_UPDATABLE)}")
        # Here, where the fields have the request's own names.
        if "display_name" in paths:
            check_display_name(request.adapter.display_name, "adapter.display_name")
        if "labels" in paths:
            check_labels(request.adapter.labels, "adapter.labels")
        check_key(request.idempotency_key)
        key = (tenant, "UpdateAdapter", request.idempotency_key, hash_request((_bytes_of(request),)))
        with self._store.write() as connection:
            kept = recall(connection, *key)
            if kept is not None:
                return _to_record(kept)
            record = self._store.update(
                tenant,
                adapter_id,
                display_name=request.adapter.display_name if "display_name" in paths else None,
                labels=request.adapter.labels if "labels" in paths else None,
                connection=connection,
            )
            remember(connection, *key, asdict(record))
            return record

    def delete(self, tenant: str, request: pb.DeleteAdapterRequest) -> Deletion:
        """Remove the rows; `discard_files` is to follow. Raises NotFound unless the key's first call removed them."""
        adapter_id = parse_adapter_name(request.name, tenant)
        check_key(request.idempotency_key)
        key = (tenant, "DeleteAdapter", request.idempotency_key, hash_request((adapter_id.encode(),)))
        with self._store.write() as connection:
            kept = recall(connection, *key)
            if kept is not None:
                lists = {name: tuple(kept.get(name, ())) for name in ("hashes", "jobs")}
                return Deletion(adapter_id, DeletedAdapter(**{**kept, **lists}), replayed=True)
            deleted = self._store.delete_rows(connection, tenant, adapter_id)
            remember(connection, *key, asdict(deleted))
            return Deletion(adapter_id, deleted, replayed=False)

    def discard_files(self, deletion: Deletion) -> None:
        """Remove the files that nothing names any more, and those of the adapter's jobs."""
        self._store.discard_unused(deletion.deleted.hashes)
        for job_id in deletion.deleted.jobs:
            self._end_job(job_id)

    def _publish_upload(
        self, key: tuple[str, str, str, str], spec: pb.ImportAdapterSpec, uploaded: StagedBlob
    ) -> Imported:
        read = self._formats.read(uploaded.file, spec, self._file_limits)
        adapter = replace(read.adapter, method=_IMPORTED)
        if read.packed is None:
            return self._publish(key, _New(spec, uploaded, adapter, read.report))
        staged = self._store.stage(read.packed)
        try:
            return self._publish(key, _New(spec, staged, adapter, read.report))
        finally:
            self._store.discard(staged)

    def _stage(self, combination: Combination, tenant: str) -> StagedBlob:
        """Write what a combination gives; none of its adapters is held afterwards."""
        packed = pack_adapter(run_combination(combination, lambda operand: self._load(tenant, operand)))
        if packed.size_bytes > self._file_limits.max_bytes:
            raise InvalidArgument(
                Reason.UPLOAD_TOO_LARGE,
                f"the combined adapter has {packed.size_bytes} bytes; allowed: at most "
                f"{self._file_limits.max_bytes_text}. Combine fewer adapters, or smaller ones",
            )
        return self._store.stage(packed)

    def _kept(self, key: tuple[str, str, str, str]) -> Mapping[str, Any] | None:
        if not key[2]:
            return None
        with self._store.write() as connection:
            return recall(connection, *key)

    def _load(self, tenant: str, operand: Operand) -> Adapter:
        revision = self._store.revision(tenant, operand.adapter_id, operand.revision)
        return self._store.load(revision.content_hash, self._layout)

    def _publish(self, key: tuple[str, str, str, str], new: _New) -> Imported:
        tenant, adapter_id = key[0], new.spec.adapter_id or make_id("adapter")
        with self._store.write() as connection:
            # Asked again: the same call may have been sent twice at once.
            kept = recall(connection, *key)
            if kept is not None:
                return _replayed(kept)
            check_storage(connection, self._store.storage.quota, tenant, new.blob.size_bytes)
            before = self._find(connection, tenant, adapter_id)
            self._store.publish(
                tenant,
                adapter_id,
                new.spec.display_name,
                new.spec.labels,
                new.blob,
                new.adapter,
                connection=connection,
            )
            record = self._store.get(tenant, adapter_id, connection)
            told: dict[str, Any] = {} if new.report is None else {_REPORT: _bytes_of(new.report).hex()}
            told |= {_NOTES: list(new.notes)} if new.notes else {}
            remember(connection, *key, {**asdict(record), **told})
            return Imported(record, before, replayed=False, report=new.report, notes=new.notes)

    def _find(self, connection: Connection, tenant: str, adapter_id: str) -> AdapterRecord | None:
        try:
            return self._store.get(tenant, adapter_id, connection)
        except NotFound:
            return None


def _bytes_of(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _replayed(kept: Mapping[str, Any]) -> Imported:
    report = pb.ImportReport.FromString(bytes.fromhex(kept[_REPORT])) if _REPORT in kept else None
    record = _to_record({name: value for name, value in kept.items() if name not in (_REPORT, _NOTES)})
    return Imported(record, None, replayed=True, report=report, notes=tuple(kept.get(_NOTES, ())))


def _to_record(kept: Mapping[str, Any]) -> AdapterRecord:
    return AdapterRecord(**{**kept, "newest": RevisionRecord(**kept["newest"])})
