"""Checks of AdapterUse, wherever a request names adapters with weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hueshift.adapters.blocks import MAX_BLOCKS, Weight, resolve_blocks, scale_weight
from hueshift.adapters.layout import BaseLayout
from hueshift.server.rpc.checker import Checker
from hueshift.server.rpc.names import parse_adapter_name
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb

MAX_WEIGHT = 2.0


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """An adapter of a checked request, not looked up yet. `revision` 0 means the newest.

    `blocks` are its weights by block, to be multiplied by `weight`; 1 if there are none.
    """

    adapter_id: str
    given: str
    revision: int
    weight: float
    blocks: Weight = 1.0

    @property
    def strength(self) -> Weight:
        """The weight of every layer."""
        return scale_weight(self.blocks, self.weight)


def check_uses(
    check: Checker, uses: Sequence[pb.AdapterUse], path: str, tenant: str, limits: LimitSettings, layout: BaseLayout
) -> tuple[WantedAdapter, ...]:
    """Check the adapters that the field `path` names, for the base model of `layout`; what is wrong goes to `check`."""
    if len(uses) > limits.max_adapters:
        check.wrong(path, f"{len(uses)} given; allowed: at most {limits.max_adapters}")
        return ()
    wanted: dict[str, WantedAdapter] = {}
    for index, use in enumerate(uses):
        found = _check_use(check, use, f"{path}[{index}]", tenant, layout)
        if found is None:
            continue
        if found.adapter_id in wanted:
            check.wrong(
                f"{path}[{index}].adapter",
                f"{found.adapter_id!r} is named twice; name it once with the sum of the weights",
            )
        wanted[found.adapter_id] = found
    return tuple(wanted.values())


def check_name(check: Checker, name: str, revision: int, path: str, tenant: str) -> str | None:
    """Return the id of an adapter of the tenant, or None; what is wrong goes to `check`."""
    if revision < 0:
        check.wrong(f"{path}.revision", f"{revision} given; allowed: 1 or more, or 0 for the newest")
    return check.run(lambda: parse_adapter_name(name, tenant, f"{path}.adapter"))


def _check_use(check: Checker, use: pb.AdapterUse, path: str, tenant: str, layout: BaseLayout) -> WantedAdapter | None:
    weight = use.weight if use.HasField("weight") else 1.0
    _check_weight(check, weight, f"{path}.weight")
    blocks = _check_blocks(check, use, f"{path}.block_weights", layout)
    adapter_id = check_name(check, use.adapter, use.revision, path, tenant)
    return None if adapter_id is None else WantedAdapter(adapter_id, use.adapter, use.revision, weight, blocks)


def _check_weight(check: Checker, weight: float, field: str) -> bool:
    allowed = math.isfinite(weight) and abs(weight) <= MAX_WEIGHT
    if not allowed:
        check.wrong(field, f"{weight:g} given; allowed: {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return allowed


def _check_blocks(check: Checker, use: pb.AdapterUse, path: str, layout: BaseLayout) -> Weight:
    given = dict(use.block_weights)
    if not given:
        return 1.0
    # Too many are refused as such: nobody reads a million sentences, and writing them would hold up every other call.
    some = sorted(given.items()) if len(given) <= MAX_BLOCKS else ()
    fine = [_check_weight(check, weight, f"{path}[{name[:80]!r}]") for name, weight in some]
    blocks = check.run(lambda: resolve_blocks(given, layout, path)) if all(fine) else None
    return 1.0 if blocks is None else blocks
