"""Mixes with dense deltas (DreamBooth, Ruiz et al. 2023): each runs from weights of its own, in calls of its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.engines.interface import EngineRow, Plan, UNetEngine, dense_in
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import is_text_side


def no_dense_deltas(engine: str) -> FailedPrecondition:
    """What is told to a request for dense deltas that the engine cannot serve."""
    return FailedPrecondition(
        Reason.PLAN_UNAVAILABLE,
        f"the adapter changes whole weights (dense deltas), which the {engine} engine does not serve as it is set up; "
        "bring it to a low rank (import it with a rank, or train with rank 1 or more), or set engine.kind to torch, on "
        "a GPU with engine.merged_slots of 1 or more",
    )


def check_whole(dense: frozenset[int], plan: Plan, adapter_index: Tensor) -> None:
    """Raise InvalidArgument on rows of the slots `dense` in a call of another plan than the merged one.

    An index on a device is trusted: reading it back would stall the stream.
    """
    if not dense or plan is Plan.MERGED or adapter_index.device.type != "cpu":
        return
    found = sorted(dense & set(adapter_index.tolist()))
    if found:
        raise InvalidArgument.for_field(
            "plan", f"slots {found} hold dense deltas, which {plan} does not run; use {Plan.MERGED}, one slot a call"
        )


def divide(engine: UNetEngine, slots: Sequence[int]) -> list[list[int]]:
    """Divide pictures, by the slots of their mixes, into what can share a call: numbers into `slots`, in order."""
    dense = dense_in(engine)
    calls: dict[int | None, list[int]] = {}
    for number, slot in enumerate(slots):
        calls.setdefault(slot if slot in dense else None, []).append(number)
    return sorted(calls.values())


def only_slot(adapter_index: Tensor) -> int:
    """The slot that all rows of a call name. Raises InvalidArgument if there are several."""
    slot = int(adapter_index[0])
    if bool(torch.any(adapter_index != slot)):
        raise InvalidArgument.for_field("adapter_index", "rows of the merged plan must share one slot")
    return slot


def whole_weights(
    row: EngineRow, base: Mapping[str, Tensor], rows: RowLayout, factors: SpectralFactors
) -> dict[str, Tensor]:
    """Weights of the base under a row with dense deltas, where they differ from the base's own; not its branches.

    `base` has the weights by layer. W' = W + U diag(sigma' - sigma) V^T + delta in fp32, in the weights' own dtype,
    device and layout; norms have the row's weights.
    """
    deltas, spectral = row.dense or {}, row.spectral
    found: dict[str, Tensor] = {}
    for layer in rows.layout.matrices:
        if is_text_side(layer.name):
            continue
        weight = base[layer.name]
        change: Tensor | None = None
        if spectral is not None:
            begin = rows.layout.matrix_offsets[layer.name]
            shift = spectral[begin : begin + layer.rank].cpu() - factors.sigma[layer.name]
            if bool(shift.any()):
                change = (factors.u[layer.name].float() * shift) @ factors.vh[layer.name].float()
        if layer.name in deltas:
            delta = deltas[layer.name].float()
            change = delta if change is None else change + delta.to(change.device)
        if change is not None:
            whole = weight.float() + change.to(weight.device).reshape(weight.shape)
            found[layer.name] = torch.empty_like(weight).copy_(whole)
    if spectral is not None:
        for norm in rows.layout.norms:
            begin = rows.layout.norm_offsets[norm.name]
            values = spectral[begin : begin + norm.size]
            found[norm.name] = torch.empty_like(base[norm.name]).copy_(values)
    return found
