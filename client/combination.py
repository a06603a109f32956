"""Adapters made of adapters: the operations of CombineAdapters, and their answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

from hueshift.client.adapters import Adapter, read_adapter_record
from hueshift.client.calls import Unary
from hueshift.client.generation import Adapters, to_uses
from hueshift.client.uploads import new_key
from hueshift.v1 import adapters_pb2 as pb


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter by name or bare id; revision 0 is the newest."""

    adapter: str
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Sum:
    """A weighted sum of one to four adapters, given as in `generate`; weights may differ by block."""

    adapters: Adapters


@dataclass(frozen=True, slots=True)
class Interpolation:
    """The point between two adapters: `first` at position 0, `second` at 1."""

    first: str | AdapterRef
    second: str | AdapterRef
    position: float


@dataclass(frozen=True, slots=True)
class BlockMix:
    """Some blocks of `structure` and the rest of `appearance`. Without `blocks`: the last two down blocks."""

    structure: str | AdapterRef
    appearance: str | AdapterRef
    blocks: Sequence[str] = ()


Operation: TypeAlias = Sum | Interpolation | BlockMix


@dataclass(frozen=True, slots=True)
class CombinedAdapter(Adapter):
    """A stored combination. `notes` say what keeps the server from drawing with it as it is set up now."""

    notes: tuple[str, ...] = ()


def combine_call(
    operation: Operation,
    *,
    adapter_id: str = "",
    display_name: str = "",
    labels: Mapping[str, str] | None = None,
    idempotency_key: str = "",
) -> Unary[pb.CombineAdaptersRequest, pb.CombineAdaptersResponse, CombinedAdapter]:
    """Store a combination. Repeats of this one call, retries included, store it once."""
    request = pb.CombineAdaptersRequest(
        adapter_id=adapter_id,
        display_name=display_name,
        labels=labels or {},
        idempotency_key=idempotency_key or new_key(),
    )
    match operation:
        case Sum():
            request.sum.CopyFrom(pb.AdapterSum(parts=to_uses(operation.adapters)))
        case Interpolation():
            between = pb.AdapterInterpolation(
                first=_ref(operation.first), second=_ref(operation.second), position=operation.position
            )
            request.interpolation.CopyFrom(between)
        case BlockMix():
            mix = pb.AdapterBlockMix(
                structure=_ref(operation.structure), appearance=_ref(operation.appearance), blocks=operation.blocks
            )
            request.block_mix.CopyFrom(mix)
    return Unary(lambda s: s.adapters.CombineAdapters, request, _read_combined)


def _ref(adapter: str | AdapterRef) -> pb.AdapterRef:
    ref = AdapterRef(adapter) if isinstance(adapter, str) else adapter
    return pb.AdapterRef(adapter=ref.adapter, revision=ref.revision)


def _read_combined(message: pb.CombineAdaptersResponse) -> CombinedAdapter:
    record = read_adapter_record(message.adapter)
    return CombinedAdapter(
        **{field.name: getattr(record, field.name) for field in fields(record)}, notes=tuple(message.notes)
    )
