"""Adapters made of a tenant's adapters: what a CombineAdapters request asks for, and the adapter it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.algebra import add, interpolate, mix_blocks
from hueshift.adapters.blocks import STRUCTURE, Weight, resolve_blocks
from hueshift.adapters.layout import BaseLayout
from hueshift.server.rpc.adapter_uses import check_name, check_uses
from hueshift.server.rpc.checker import Checker
from hueshift.server.rpc.names import check_id
from hueshift.server.settings import LimitSettings
from hueshift.server.store.adapter_records import check_display_name, check_labels
from hueshift.server.store.idempotency import check_key
from hueshift.v1 import adapters_pb2 as pb

METHOD = "combine"
_OPERATIONS = ("sum", "interpolation", "block_mix")

Load: TypeAlias = Callable[["Operand"], Adapter]
"""Reads one adapter of the tenant."""


@dataclass(frozen=True, slots=True)
class Operand:
    """An adapter to combine; `revision` 0 means the newest."""

    adapter_id: str
    revision: int


@dataclass(frozen=True, slots=True)
class Sum:
    """A weighted sum."""

    parts: tuple[tuple[Operand, Weight], ...]

    def run(self, load: Load) -> Adapter:
        """Load and add. An adapter of weight 0 is not loaded."""
        return add([(load(operand), weight) for operand, weight in self.parts if weight != 0])


@dataclass(frozen=True, slots=True)
class Interpolation:
    """A point between two adapters."""

    first: Operand
    second: Operand
    position: float

    def run(self, load: Load) -> Adapter:
        """Load and interpolate."""
        return interpolate(load(self.first), load(self.second), self.position)


@dataclass(frozen=True, slots=True)
class BlockMix:
    """`weight` times one adapter and its complement to 1 times another."""

    structure: Operand
    appearance: Operand
    weight: Weight

    def run(self, load: Load) -> Adapter:
        """Load and mix."""
        return mix_blocks(load(self.structure), load(self.appearance), self.weight)


Combination: TypeAlias = Sum | Interpolation | BlockMix


def check_combination(
    request: pb.CombineAdaptersRequest, tenant: str, limits: LimitSettings, layout: BaseLayout
) -> Combination:
    """Check a request of `tenant`.

    Raises InvalidArgument with a violation for each wrong field, NotFound on another tenant's adapter name.
    """
    check = Checker()
    if request.adapter_id:
        check.run(lambda: check_id(request.adapter_id, "adapter_id"))
    check.run(lambda: check_display_name(request.display_name))
    check.run(lambda: check_labels(request.labels))
    check.run(lambda: check_key(request.idempotency_key))
    operation = _check_operation(check, request, tenant, limits, layout)
    check.done()
    return operation


def run_combination(combination: Combination, load: Load) -> Adapter:
    """Return the combined adapter. Raises what loading and the algebra raise."""
    return replace(combination.run(load), method=METHOD)


def _check_operation(
    check: Checker, request: pb.CombineAdaptersRequest, tenant: str, limits: LimitSettings, layout: BaseLayout
) -> Combination:
    match request.WhichOneof("operation"):
        case "sum":
            return _check_sum(check, request.sum, tenant, limits, layout)
        case "interpolation":
            return _check_interpolation(check, request.interpolation, tenant)
        case "block_mix":
            return _check_block_mix(check, request.block_mix, tenant, layout)
    check.wrong("operation", f"none given; allowed: one of {', '.join(_OPERATIONS)}")
    return Sum(())


def _check_sum(check: Checker, given: pb.AdapterSum, tenant: str, limits: LimitSettings, layout: BaseLayout) -> Sum:
    if not given.parts:
        check.wrong("sum.parts", f"none given; allowed: 1 to {limits.max_adapters}")
    wanted = check_uses(check, given.parts, "sum.parts", tenant, limits, layout)
    parts = tuple((Operand(adapter.adapter_id, adapter.revision), adapter.strength) for adapter in wanted)
    if parts and not any(weight != 0 for _, weight in parts):
        check.wrong("sum.parts", "0 is the weight of every layer; give one of them another weight")
    return Sum(parts)


def _check_interpolation(check: Checker, given: pb.AdapterInterpolation, tenant: str) -> Interpolation:
    if not (math.isfinite(given.position) and 0 <= given.position <= 1):
        check.wrong("interpolation.position", f"{given.position:g} given; allowed: 0 to 1")
    return Interpolation(
        _check_ref(check, given.first, "interpolation.first", tenant),
        _check_ref(check, given.second, "interpolation.second", tenant),
        given.position,
    )


def _check_block_mix(check: Checker, given: pb.AdapterBlockMix, tenant: str, layout: BaseLayout) -> BlockMix:
    wanted = dict.fromkeys(given.blocks or (STRUCTURE,), 1.0)
    weight = check.run(lambda: resolve_blocks(wanted, layout, "block_mix.blocks"))
    return BlockMix(
        _check_ref(check, given.structure, "block_mix.structure", tenant),
        _check_ref(check, given.appearance, "block_mix.appearance", tenant),
        1.0 if weight is None else weight,
    )


def _check_ref(check: Checker, ref: pb.AdapterRef, path: str, tenant: str) -> Operand:
    adapter_id = check_name(check, ref.adapter, ref.revision, path, tenant)
    return Operand(adapter_id or "", ref.revision)
