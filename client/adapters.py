"""Adapters: their record and the calls of AdapterService."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from hashlib import sha256
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from hueshift.client.calls import Page, Paged, Unary, Upload
from hueshift.client.choices import AdapterFormat, AdapterKind
from hueshift.client.conversion import Conversion, ImportReport, read_report
from hueshift.client.errors import CorruptAnswer
from hueshift.client.uploads import chunks, new_key
from hueshift.client.wire import from_enum, to_datetime, to_enum
from hueshift.v1 import adapters_pb2 as pb


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's record. `content_hash` and `size_bytes` are those of the newest revision's file."""

    name: str
    display_name: str
    kind: AdapterKind
    revision: int
    content_hash: str
    base_hash: str
    size_bytes: int
    method: str
    identifier: str
    labels: Mapping[str, str]
    created: datetime
    updated: datetime
    resident: bool
    pinned: bool
    fine_tune: str

    @property
    def id(self) -> str:
        """The bare id, the last part of the name."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class ImportedAdapter(Adapter):
    """A stored adapter. `report` tells how a file of another program was converted; None for Hueshift's own files."""

    report: ImportReport | None = None


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """An adapter's record and its file."""

    adapter: Adapter
    data: bytes


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a delete removed. `jobs` counts the adapter's ended fine-tuning jobs."""

    revisions: int
    bytes: int
    jobs: int = 0


@dataclass(frozen=True, slots=True)
class StorageUse:
    """Bytes that you store, and how many it may be in all; None: as many as you like."""

    adapters: int
    pictures: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Warmed:
    """A warmed adapter; `loaded` is False if it was resident already."""

    adapter: Adapter
    loaded: bool


def read_adapter_record(message: pb.Adapter) -> Adapter:
    """Return the record of a message."""
    return Adapter(
        name=message.name,
        display_name=message.display_name,
        kind=from_enum(pb.AdapterKind, "ADAPTER_KIND", AdapterKind, message.kind, AdapterKind.UNKNOWN),
        revision=message.revision,
        content_hash=message.content_hash,
        base_hash=message.base_hash,
        size_bytes=message.size_bytes,
        method=message.method,
        identifier=message.identifier,
        labels=dict(message.labels),
        created=to_datetime(message.create_time),
        updated=to_datetime(message.update_time),
        resident=message.resident,
        pinned=message.pinned,
        fine_tune=message.fine_tune,
    )


def read_imported(message: pb.ImportAdapterResponse) -> ImportedAdapter:
    """Return the record of an import, with its report."""
    record = read_adapter_record(message.adapter)
    report = read_report(message.report) if message.HasField("report") else None
    return ImportedAdapter(**{field.name: getattr(record, field.name) for field in fields(record)}, report=report)


def import_call(
    data: bytes,
    *,
    adapter_id: str = "",
    display_name: str = "",
    labels: Mapping[str, str] | None = None,
    idempotency_key: str = "",
    conversion: Conversion | None = None,
) -> Upload[pb.ImportAdapterRequest, pb.ImportAdapterResponse, ImportedAdapter]:
    """Store an adapter file. Repeats of this one call, retries included, store it once."""
    how = conversion or Conversion()
    spec = pb.ImportAdapterSpec(
        adapter_id=adapter_id,
        display_name=display_name,
        labels=labels or {},
        idempotency_key=idempotency_key or new_key(),
        size_bytes=len(data),
        rank=how.rank,
        word=how.word,
        served_only=how.served_only,
        complete=how.complete,
        dense=how.dense,
    )

    def messages() -> Iterator[pb.ImportAdapterRequest]:
        yield pb.ImportAdapterRequest(spec=spec)
        for chunk in chunks(data):
            yield pb.ImportAdapterRequest(chunk=chunk)

    return Upload(lambda s: s.adapters.ImportAdapter, messages, read_imported)


def export_request(name: str, revision: int, form: AdapterFormat, partial: bool) -> pb.ExportAdapterRequest:
    """Ask for an adapter's file in a form; revision 0 is the newest."""
    number = to_enum(pb.AdapterFormat, "ADAPTER_FORMAT", form)
    return pb.ExportAdapterRequest(name=name, revision=revision, format=number, partial=partial)


class ExportAssembly:
    """Puts an export's messages together and checks the bytes against the record, which is of Hueshift's own form."""

    def __init__(self, form: AdapterFormat = AdapterFormat.HUESHIFT) -> None:
        self._own = form is AdapterFormat.HUESHIFT
        self._adapter: Adapter | None = None
        self._data = bytearray()

    def take(self, message: pb.ExportAdapterResponse) -> None:
        """Add one message."""
        if message.WhichOneof("part") == "adapter":
            self._adapter = read_adapter_record(message.adapter)
        else:
            self._data += message.chunk

    def finish(self, revision: int) -> ExportedAdapter:
        """Return the whole. Raises CorruptAnswer where it is not what the record says.

        The record describes the newest revision, so an older `revision` can only be checked for presence.
        """
        if self._adapter is None:
            raise CorruptAnswer.because("the export came without the adapter's record")
        data = bytes(self._data)
        checked = self._own and revision in (0, self._adapter.revision)
        if checked and sha256(data).hexdigest() != self._adapter.content_hash:
            raise CorruptAnswer.because(f"the {len(data)} bytes of {self._adapter.name} do not match its hash")
        return ExportedAdapter(self._adapter, data)


def get_call(name: str) -> Unary[pb.GetAdapterRequest, pb.GetAdapterResponse, Adapter]:
    """Return one record."""
    request = pb.GetAdapterRequest(name=name)
    return Unary(lambda s: s.adapters.GetAdapter, request, lambda r: read_adapter_record(r.adapter))


def list_call(labels: Mapping[str, str] | None, page_size: int) -> Paged[Adapter]:
    """Return the records page by page."""

    def page(token: str) -> Unary[Any, Any, Page[Adapter]]:
        request = pb.ListAdaptersRequest(page_size=page_size, page_token=token, labels=labels or {})
        return Unary(lambda s: s.adapters.ListAdapters, request, _read_page)

    return page


def update_call(
    name: str, *, display_name: str | None, labels: Mapping[str, str] | None
) -> Unary[pb.UpdateAdapterRequest, pb.UpdateAdapterResponse, Adapter]:
    """Change what is not None."""
    request = pb.UpdateAdapterRequest(
        adapter=pb.Adapter(name=name, display_name=display_name or "", labels=labels or {}),
        update_mask=FieldMask(
            paths=[p for p, value in (("display_name", display_name), ("labels", labels)) if value is not None]
        ),
        idempotency_key=new_key(),
    )
    return Unary(lambda s: s.adapters.UpdateAdapter, request, lambda r: read_adapter_record(r.adapter))


def delete_call(name: str) -> Unary[pb.DeleteAdapterRequest, pb.DeleteAdapterResponse, Deleted]:
    """Remove an adapter with all its revisions."""
    request = pb.DeleteAdapterRequest(name=name, idempotency_key=new_key())
    return Unary(lambda s: s.adapters.DeleteAdapter, request, lambda r: Deleted(r.revisions, r.bytes, r.fine_tunes))


def storage_call() -> Unary[pb.GetStorageRequest, pb.GetStorageResponse, StorageUse]:
    """Ask what is stored."""

    def read(answer: pb.GetStorageResponse) -> StorageUse:
        return StorageUse(answer.adapter_bytes, answer.picture_bytes, answer.limit_bytes or None)

    return Unary(lambda s: s.adapters.GetStorage, pb.GetStorageRequest(), read)


def warm_call(
    name: str, *, revision: int, pin: bool | None
) -> Unary[pb.WarmAdapterRequest, pb.WarmAdapterResponse, Warmed]:
    """Load an adapter before it is needed; True pins it, False unpins it, None leaves the pin."""
    request = pb.WarmAdapterRequest(name=name, revision=revision, pin=pin)
    return Unary(lambda s: s.adapters.WarmAdapter, request, lambda r: Warmed(read_adapter_record(r.adapter), r.loaded))


def _read_page(message: pb.ListAdaptersResponse) -> Page[Adapter]:
    return Page(tuple(read_adapter_record(a) for a in message.adapters), message.next_page_token)
