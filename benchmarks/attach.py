"""What an adapter costs before its first step, by the tier it is found in, against diffusers' ways of changing a LoRA.

`slot`: its row is in the engine. `rows`: a composed row in host memory is copied in. `host`: its tensors are in memory
and the row is composed first. `file`: its file is read, checked and composed. Each ends when a step could read the row.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.cuda_options import CompileKind
from hueshift.engines.mixes import make_mix
from hueshift.engines.residency import SlotCache
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.residency_tiers import Tier

BENCH = "attach"
PLENTY = 1 << 36


class Quiet:
    """A ResidencyObserver that tells nobody."""

    def looked_up(self, tier: Tier, *, hit: bool) -> None:
        """Nothing."""

    def loaded(self, tier: Tier, seconds: float) -> None:
        """Nothing."""

    def evicted(self, tier: Tier) -> None:
        """Nothing."""

    def holds(self, tier: Tier, entries: int, nbytes: int) -> None:
        """Nothing."""


def rows(kit: Any) -> Iterator[dict[str, Any]]:
    """Measure every tier for both kinds of adapters."""
    engine = kit.engine(compile=CompileKind.GRAPH, slots=3, max_batch=2, weight_slots=0)
    baseline = _hotswap(kit)
    for kind in (AdapterKind.SPECTRAL, AdapterKind.LOWRANK):
        for tier, figures in _tiers(kit, engine, kind):
            yield kit.row(
                BENCH,
                f"{kind}-{tier}",
                {
                    **figures,
                    "baseline": "diffusers with peft: hot swap of a LoRA, tensors in memory",
                    "baseline_ms": baseline["ms"],
                    "ratio": baseline["ms"] / max(figures["ms"], 1e-6),
                },
            )


def _tiers(kit: Any, engine: Any, kind: AdapterKind) -> Iterator[tuple[str, dict[str, float]]]:
    adapters = [kit.adapter(seed, kind) for seed in range(2)]
    files = [write_adapter(adapter) for adapter in adapters]

    def load(key: str) -> Adapter:
        return read_adapter(files[int(key)], kit.base.layout, FileLimits())

    budgets = {"slot": (PLENTY, PLENTY), "rows": (PLENTY, PLENTY), "host": (PLENTY, 0), "file": (0, 0)}
    for tier, (host_bytes, row_bytes) in budgets.items():
        host = HostCache(load, host_bytes, Quiet())
        cache = RowCache(host, kit.rows, kit.factors, kit.norms, row_bytes, Quiet(), pinned=kit.device.type == "cuda")
        # Two slots for `slot`, where both mixes stay; else one, so that each evicts the other.
        slots = SlotCache(engine if tier == "slot" else _OneSlot(engine), cache, Quiet())
        yield tier, _alternate(kit, engine, slots)


def _alternate(kit: Any, engine: Any, slots: SlotCache) -> dict[str, float]:
    """Time of bringing in one of two mixes in turn, until the steps' lane has it."""
    mixes = [make_mix([(key, 1.0)]) for key in ("0", "1")]
    turn = 0

    def attach() -> None:
        nonlocal turn
        turn += 1
        mix = mixes[turn % 2]
        if slots.acquire(slots.prepare(mix)) is None:
            raise RuntimeError("no slot is free")
        slots.release(mix)
        engine.finish_rows()
        engine.lane.mark().wait()

    for _ in range(4):
        attach()
    return _wall(attach, kit.scale.repeats)


def _wall(work: Callable[[], None], repeats: int) -> dict[str, float]:
    from hueshift.engines.cuda_lane import HostLane

    found = HostLane().times_ms(work, repeats)
    return {"ms": found[repeats // 2], "p20": found[repeats // 5], "p80": found[repeats * 4 // 5]}


class _OneSlot:
    """An engine of which one slot beside the base's may be used."""

    slots = 2

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _hotswap(kit: Any) -> dict[str, float]:
    """Time of peft's hot swap in diffusers: the new factors are copied over the old ones, layer by layer."""
    import copy

    unet: Any = copy.deepcopy(kit.base.unet).to(kit.dtype)
    states = [lora_state(kit, seed) for seed in range(2)]
    unet.load_lora_adapter(dict(states[0]), prefix=None, adapter_name="user")
    turn = 0

    def swap() -> None:
        nonlocal turn
        turn += 1
        unet.load_lora_adapter(dict(states[turn % 2]), prefix=None, adapter_name="user", hotswap=True)
        if kit.device.type == "cuda":
            torch.cuda.synchronize()

    swap()
    return _wall(swap, max(3, kit.scale.repeats // 5))


def lora_state(kit: Any, seed: int) -> dict[str, torch.Tensor]:
    """A low-rank adapter as the state that diffusers loads: factors of linear layers by peft's names."""
    adapter: Adapter = kit.adapter(seed, AdapterKind.LOWRANK)
    linear = {layer.name for layer in kit.base.layout.matrices if not layer.is_conv}
    state = {}
    for name, parts in adapter.lowrank.items():
        if name in linear:
            state[f"{name}.lora_A.weight"] = parts.a.to(kit.device, kit.dtype)
            state[f"{name}.lora_B.weight"] = parts.b.to(kit.device, kit.dtype)
    return state
