"""Changes of a tenant's adapters, each kept with its idempotency key in one transaction. Run in a thread."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from google.protobuf.message import Message
from sqlalchemy import Connection

from hueshift.adapters.errors import InvalidArgument, NotFound
from hueshift.adapters.validate import FileLimits
from hueshift.server.rpc.adapter_import import AdapterFormats, ReadFile
from hueshift.server.rpc.adapter_upload import Upload
from hueshift.server.rpc.names import make_id, parse_adapter_name
from hueshift.server.store.adapter_records import AdapterRecord, DeletedAdapter, RevisionRecord
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import StagedBlob
from hueshift.server.store.idempotency import check_key, hash_request, recall, remember
from hueshift.v1 import adapters_pb2 as pb

_UPDATABLE = ("display_name", "labels")
# What the contract calls the method of a file that was brought in.
_IMPORTED = "import"
# Field of a kept import that holds its report.
_REPORT = "report"


@dataclass(frozen=True, slots=True)
class Imported:
    """The stored adapter, what it was before (None for a new one), and whether nothing new was stored.

    `report` tells how a file of another program was converted.
    """

    record: AdapterRecord
    before: AdapterRecord | None
    replayed: bool
    report: pb.ImportReport | None = None


@dataclass(frozen=True, slots=True)
class Deletion:
    """An adapter whose rows are gone and whose files are to follow."""

    adapter_id: str
    deleted: DeletedAdapter
    replayed: bool


class AdapterChanges:
    """Import, update and delete. `max_bytes` caps an adapter file."""

    def __init__(self, store: AdapterStore, formats: AdapterFormats, max_bytes: int) -> None:
        self._store = store
        self._formats = formats
        self._limits = FileLimits(max_bytes=max_bytes)

    def store_upload(self, tenant: str, upload: Upload) -> Imported:
        """Validate an uploaded file and publish it; the temporary file is gone afterwards.

        Raises what `AdapterFormats.read` raises, and AlreadyExists (IDEMPOTENCY_CONFLICT).
        """
        spec = upload.spec
        try:
            staged = upload.file.finish()
            request_hash = hash_request((_bytes_of(spec), staged.content_hash.encode()))
            key = (tenant, "ImportAdapter", spec.idempotency_key, request_hash)
            kept = self._kept(key)
            if kept is None:
                read = self._formats.read(staged.file, spec, self._limits)
                return self._publish(key, spec, staged, read)
            return _replayed(kept)
        finally:
            upload.file.discard()

    def update(self, tenant: str, request: pb.UpdateAdapterRequest) -> AdapterRecord:
        """Change the fields that the mask names. Raises InvalidArgument on a wrong mask or value, NotFound."""
        adapter_id = parse_adapter_name(request.adapter.name, tenant, "adapter.name")
        paths = set(request.update_mask.paths)
        unknown = sorted(paths - set(_UPDATABLE))
        if unknown or not paths:
            given = f"{unknown[0][:80]!r}" if unknown else "no path"
            raise InvalidArgument.for_field("update_mask", f"{given} given; allowed: {' and '.join(_UPDATABLE)}")
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
                hashes = tuple(kept["hashes"])
                return Deletion(adapter_id, DeletedAdapter(kept["revisions"], kept["bytes"], hashes), replayed=True)
            deleted = self._store.delete_rows(connection, tenant, adapter_id)
            remember(connection, *key, asdict(deleted))
            return Deletion(adapter_id, deleted, replayed=False)

    def discard_files(self, deletion: Deletion) -> None:
        """Remove the files that nothing names any more."""
        self._store.discard_unused(deletion.deleted.hashes)

    def _kept(self, key: tuple[str, str, str, str]) -> Mapping[str, Any] | None:
        if not key[2]:
            return None
        with self._store.write() as connection:
            return recall(connection, *key)

    def _publish(
        self, key: tuple[str, str, str, str], spec: pb.ImportAdapterSpec, staged: StagedBlob, read: ReadFile
    ) -> Imported:
        tenant, adapter_id = key[0], spec.adapter_id or make_id("adapter")
        with self._store.write() as connection:
            # Asked again: the same call may have been sent twice at once.
            kept = recall(connection, *key)
            if kept is not None:
                return _replayed(kept)
            before = self._find(connection, tenant, adapter_id)
            self._store.publish(
                tenant,
                adapter_id,
                spec.display_name,
                spec.labels,
                staged if read.data is None else read.data,
                replace(read.adapter, method=_IMPORTED),
                connection=connection,
            )
            record = self._store.get(tenant, adapter_id, connection)
            report = {} if read.report is None else {_REPORT: _bytes_of(read.report).hex()}
            remember(connection, *key, {**asdict(record), **report})
            return Imported(record, before, replayed=False, report=read.report)

    def _find(self, connection: Connection, tenant: str, adapter_id: str) -> AdapterRecord | None:
        try:
            return self._store.get(tenant, adapter_id, connection)
        except NotFound:
            return None


def _bytes_of(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _replayed(kept: Mapping[str, Any]) -> Imported:
    report = pb.ImportReport.FromString(bytes.fromhex(kept[_REPORT])) if _REPORT in kept else None
    record = _to_record({name: value for name, value in kept.items() if name != _REPORT})
    return Imported(record, None, replayed=True, report=report)


def _to_record(kept: Mapping[str, Any]) -> AdapterRecord:
    return AdapterRecord(**{**kept, "newest": RevisionRecord(**kept["newest"])})
