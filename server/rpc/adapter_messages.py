"""Adapter records as messages of the contract."""

from google.protobuf.timestamp_pb2 import Timestamp

from hueshift.adapters.adapter import AdapterKind
from hueshift.server.rpc.names import adapter_name, fine_tune_name
from hueshift.server.store.adapter_records import AdapterRecord
from hueshift.v1 import adapters_pb2 as pb

_KINDS = {
    AdapterKind.SPECTRAL.value: pb.ADAPTER_KIND_SPECTRAL,
    AdapterKind.LOWRANK.value: pb.ADAPTER_KIND_LOWRANK,
    AdapterKind.TOKENS.value: pb.ADAPTER_KIND_TOKENS,
    AdapterKind.KV.value: pb.ADAPTER_KIND_KV,
    AdapterKind.DENSE.value: pb.ADAPTER_KIND_DENSE,
}


def to_message(record: AdapterRecord, *, resident: bool) -> pb.Adapter:
    """Return the message of a record; `resident` says whether its newest revision is loaded."""
    newest = record.newest
    return pb.Adapter(
        name=adapter_name(record.tenant, record.adapter_id),
        display_name=record.display_name,
        kind=_KINDS.get(newest.kind, pb.ADAPTER_KIND_UNSPECIFIED),
        revision=newest.revision,
        content_hash=newest.content_hash,
        base_hash=newest.base_hash,
        size_bytes=newest.size_bytes,
        method=newest.method,
        identifier=newest.identifier,
        labels=record.labels,
        create_time=_timestamp(record.created),
        update_time=_timestamp(record.updated),
        resident=resident,
        pinned=record.pinned,
        fine_tune=fine_tune_name(record.tenant, newest.job_id) if newest.job_id else "",
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
