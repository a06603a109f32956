"""A whole small UNet with every kernel interpreted, as the CUDA engine calls it, against torch's form.

Each kernel has tests of its own; this one finds what lies between them: views, strides, layouts and launch
configurations as they meet in a network.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from tiny_unet import SD1_LIKE, TOKENS, TinyParts, tiny_parts

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.cuda_attention import AttentionTable
from hueshift.engines.cuda_buffers import CallBuffers, CallShape
from hueshift.engines.cuda_layers import SlabRows, slab_rows
from hueshift.engines.cuda_unet import CudaUNet
from hueshift.engines.interface import EngineRow, Guides, Plan
from hueshift.engines.slabs import Slabs
from hueshift.engines.slot_weights import SlotWeights, choose_layers
from hueshift.kernels.launch import Launch

SLOTS = 4
# Adapters by slot.
KINDS = {1: AdapterKind.SPECTRAL, 3: AdapterKind.LOWRANK}


def slot_views(parts: TinyParts, slabs: Slabs, dtype: torch.dtype, side: int) -> SlabRows:
    """Slabs beside whole weights of the slots that were loaded."""
    layers = choose_layers(parts.rows.layout, 2, side, SLOTS, dtype.itemsize, 1 << 24)
    weights = SlotWeights(layers, parts.rows, SLOTS, slabs.spectral.device, dtype)
    weights.prepare(
        {f"unet.{name}": part.to(dtype) for name, part in parts.base.unet.named_parameters()}, parts.factors
    )
    for slot in KINDS:
        weights.write(slot, EngineRow(slabs.spectral[slot], slabs.lowrank[slot]))
    return replace(slab_rows(parts.rows, slabs.spectral, slabs.lowrank), own_weights=weights.weights)


def make_network(parts: TinyParts, slabs: Slabs, plan: Plan, dtype: torch.dtype, own_side: int | None) -> CudaUNet:
    """The network as the CUDA engine makes it, with weights of slots for pictures of a side if one is given."""
    if own_side is None:
        slab_views = slab_rows(parts.rows, slabs.spectral, slabs.lowrank)
    else:
        slab_views = slot_views(parts, slabs, dtype, own_side)
    return CudaUNet(
        parts.base,
        parts.factors,
        parts.rows,
        plan,
        slab_rows=slab_views,
        spectral=slabs.spectral,
        lowrank=slabs.lowrank,
        attention=AttentionTable(),
        kernels=True,
        fuse=True,
        dtype=dtype,
    )


def interpreted(plan: str, dtype: str, side: list[int], own: bool) -> dict[str, float]:
    """Run one call of a mixed batch both ways; return the error, and how often each kernel was launched."""
    parts = tiny_parts(SD1_LIKE)
    kind = getattr(torch, dtype)
    slabs = Slabs(parts.rows, parts.factors, parts.norms, SLOTS, lowrank_dtype=kind)
    for slot, adapter in KINDS.items():
        slabs.load(slot, parts.row((parts.random_adapter(slot, adapter), 1.0)))
    index = torch.tensor([0, 3] if plan == Plan.DENSE else [1, 3])
    branches = torch.where(index == 3, index, -1)
    inputs = parts.inputs(2, side=(side[0], side[1]))
    plain = AdaptedUNet(parts.base, parts.factors, parts.rows, Plan(plan))
    spectral = None if plan == Plan.DENSE else slabs.spectral
    network = make_network(parts, slabs, Plan(plan), kind, side[0] if own else None)
    launched: dict[str, float] = {}
    run = Launch.run
    # The first row confined to a word, the second by the first one's mask and with its attention.
    zero = torch.zeros(2, dtype=torch.int64)
    guides = Guides(torch.eye(2, TOKENS), zero, zero)
    views = CallBuffers(
        rows=2,
        area=side[0] * side[1],
        channels=4,
        cross=(TOKENS, inputs[2].shape[2]),
        added=0,
        device=zero.device,
        dtype=kind,
    ).at(CallShape(2, side[0], side[1]))
    views.fill(*inputs, None, index, branches)
    views.fill_guides(guides)

    def count(launch: Launch) -> None:
        name = launch.kernel.fn.__name__ if hasattr(launch.kernel, "fn") else launch.kernel.__name__
        launched[name] = launched.get(name, 0.0) + 1
        run(launch)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if plan == Plan.FULL:
            expected, mask = plain.forward_guided(*inputs, index, guides, slabs.spectral, slabs.lowrank.float())
        else:
            expected = plain(*inputs, index, spectral, slabs.lowrank.float())
        for module in _kernel_modules():
            patch.setattr(module, "on_gpu", lambda tensor: True)
        patch.setattr(Launch, "run", count)
        if plan == Plan.FULL:
            network.call_guided(views)
            launched["moved"] = float((views.mask != mask).sum())
            launched["confined"] = float((mask < 1).sum())
        else:
            network.call(views)
    return {"error": float((views.out - expected).abs().max() / expected.abs().max()), **launched}


def _kernel_modules() -> list[ModuleType]:
    """All modules that ask whether kernels run on a tensor."""
    prefix = "hueshift.kernels."
    return [module for name, module in sys.modules.items() if name.startswith(prefix) and hasattr(module, "on_gpu")]


# The larger side gives pictures that whole tiles of 128 pixels fit into, then some that they do not.
@pytest.mark.parametrize(
    ("plan", "dtype", "side", "own", "bound", "kernels"),
    [
        (Plan.FACTORED, "float16", [24, 16], False, 2e-2,
         {"_product_kernel", "_scale_kernel", "_norm_kernel", "_apply_kernel", "_residual_kernel"}),
        (Plan.FACTORED, "float32", [8, 8], True, 1e-4, {"_slot_kernel", "_product_kernel"}),
        (Plan.DENSE, "float32", [16, 16], False, 1e-4,
         {"_linear_kernel", "_norm_kernel", "_add_kernel", "_gelu_kernel"}),
        (Plan.FULL, "float32", [8, 8], False, 1e-4,
         {"_share_kernel", "_median_kernel", "_residual_kernel", "_add_kernel"}),
    ],
)  # fmt: skip
def test_a_whole_unet_on_interpreted_kernels_equals_torchs(
    interpret: Callable[..., dict[str, float]],
    plan: Plan,
    dtype: str,
    side: list[int],
    own: bool,
    bound: float,
    kernels: set[str],
) -> None:
    found = interpret(__file__, "interpreted", plan=plan.value, dtype=dtype, side=side, own=own)
    assert found["error"] <= bound
    assert set(found) >= kernels, found
    if plan is Plan.FULL:
        assert found["confined"] > 0
        assert found["moved"] == 0
