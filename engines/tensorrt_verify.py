"""Compare the plans of a TensorRT engine with torch, through the very calls that serve, before anyone is served.

A wrong graph, a dropped bias (TensorRT 11.3 warns of one with refit) or a refit that reached the wrong weights shows
here. Rows are random adapters that shift every singular value, norm weight and low-rank factor.
"""

from collections.abc import Callable

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import Reason
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import BASE_SLOT, EngineRow, Plan
from hueshift.engines.parity import random_slabs
from hueshift.engines.tensorrt_engine import MERGED, TensorRtEngine
from hueshift.engines.tensorrt_loader import Fallback, TensorRtError
from hueshift.engines.torch_engine import example_added, example_inputs

_log = structlog.get_logger()
OnParity = Callable[[str, float], None]


def verify(
    engine: TensorRtEngine, base: BaseModel, bound: float, on_parity: OnParity | None = None
) -> dict[str, float]:
    """Return the error of every plan: the largest difference from torch in fp32, over the largest output or 1.

    Leaves every slot that it used with the base's row, and the merged plan with the base. Raises TensorRtError (parity,
    ENGINE_PARITY) on an error above `bound`, and if the merged plan does not come back to the base bit for bit.
    """
    errors: dict[str, float] = {}
    checks = [plan.value for plan in engine.plans] + ([MERGED] if engine.can_merge else [])
    for role in checks:
        error = _merged_error(engine, base) if role == MERGED else _error(engine, base, Plan(role))
        errors[role] = error
        _log.info("engine_parity", engine="tensorrt", plan=role, error=error, bound=bound)
        if on_parity is not None:
            on_parity(role, error)
        # Written so that NaN is refused too.
        if not error <= bound:
            raise TensorRtError(
                Fallback.PARITY,
                f"the {role} plan differs from torch by {error:.3g}, allowed is {bound:.3g}; build it again "
                "(`hueshift engine prune --all`), or set engine.kind to torch",
                Reason.ENGINE_PARITY,
            )
    return errors


def _error(engine: TensorRtEngine, base: BaseModel, plan: Plan) -> float:
    count = min(3, engine.slots, engine.max_batch)
    rows, inputs, index = _sample(engine, base, count)
    expected, added = _reference(engine, base, plan, inputs, index, rows), example_added(base, count)
    try:
        for slot in range(BASE_SLOT + 1, count):
            engine.load_row(slot, EngineRow(rows[0][slot], rows[1][slot]))
        found = engine.denoise(plan, *inputs, index, added)
        # Once more: the second call is the captured one.
        again = engine.denoise(plan, *inputs, index, added)
    finally:
        _restore(engine, count)
    return max(_distance(found, expected), _distance(again, expected))


def _merged_error(engine: TensorRtEngine, base: BaseModel) -> float:
    """Base, adapter, base again: the first and last must agree bit for bit, each with torch within the bound."""
    count = min(2, engine.max_batch)
    rows, inputs, _ = _sample(engine, base, 2)
    inputs = (inputs[0][:count], inputs[1][:count], inputs[2][:count])
    slots = [torch.full((count,), slot) for slot in (BASE_SLOT, BASE_SLOT + 1)]
    expected = [_reference(engine, base, Plan.FACTORED, inputs, index, rows) for index in slots]
    engine.load_row(BASE_SLOT + 1, EngineRow(rows[0][1], rows[1][1]))
    try:
        outputs = []
        for slot in (BASE_SLOT, BASE_SLOT + 1, BASE_SLOT):
            engine.merge(slot)
            outputs.append(engine.denoise_merged(*inputs, example_added(base, count)))
    finally:
        _restore(engine, 2)
    if not torch.equal(outputs[0], outputs[2]):
        raise TensorRtError(
            Fallback.PARITY, "the merged plan did not come back to the base after an adapter", Reason.ENGINE_PARITY
        )
    return max(_distance(outputs[0], expected[0]), _distance(outputs[1], expected[1]))


Inputs = tuple[Tensor, Tensor, Tensor]


def _sample(engine: TensorRtEngine, base: BaseModel, count: int) -> tuple[tuple[Tensor, Tensor], Inputs, Tensor]:
    latents, timesteps, cross, _ = example_inputs(base, count)
    spectral, lowrank = random_slabs(engine.rows, engine.factors, engine.norms)
    return (spectral, lowrank), (latents, timesteps, cross), torch.arange(count)


def _reference(
    engine: TensorRtEngine, base: BaseModel, plan: Plan, inputs: Inputs, index: Tensor, rows: tuple[Tensor, Tensor]
) -> Tensor:
    device = engine.lane.device
    unet = AdaptedUNet(base, engine.factors, engine.rows, plan, channels_last=False).to(device, torch.float32)
    slab = rows[0].to(device) if plan is Plan.FACTORED else None
    added = example_added(base, len(index))
    added = None if added is None else added.to(device)
    with torch.no_grad():
        out: Tensor = unet(*(part.to(device) for part in inputs), index.to(device), slab, rows[1].to(device), added)
    return out.cpu()


def _restore(engine: TensorRtEngine, count: int) -> None:
    for slot in range(BASE_SLOT + 1, count):
        engine.load_row(slot, EngineRow())


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).abs().max()) / max(1.0, float(expected.abs().max()))
