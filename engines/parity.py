"""Compare an engine's graphs with torch before they serve anyone."""

from collections.abc import Callable, Mapping

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Guides, Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.torch_engine import example_added, example_inputs

_ROWS = 3
_SEED = 20_260
_log = structlog.get_logger()

RunGraph = Callable[
    [Plan, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Guides | None, Tensor | None], tuple[Tensor, ...]
]
"""run(plan, sample, timestep, cross, adapter_index, spectral_slab, lowrank_slab, guides, added) returns the output, and
under Plan.FULL the masks too."""

OnParity = Callable[[str, float], None]
"""on_parity(plan, error); `merged` is a plan too."""


def check_parity(
    run_graph: RunGraph,
    plans: tuple[Plan, ...],
    *,
    base: BaseModel,
    factors: SpectralFactors,
    rows: RowLayout,
    norms: Mapping[str, Tensor],
    bound: float,
    on_parity: OnParity | None = None,
) -> None:
    """Measure every plan, log it, give it to `on_parity`, and refuse an engine that errs by more than `bound`.

    Raises FailedPrecondition (ENGINE_PARITY).
    """
    for plan in plans:
        error = parity_error(run_graph, plan, base=base, factors=factors, rows=rows, norms=norms)
        _log.info("engine_parity", plan=str(plan), error=error, bound=bound)
        if on_parity is not None:
            on_parity(plan, error)
        # Written so that NaN is refused too.
        if not error <= bound:
            raise FailedPrecondition(
                Reason.ENGINE_PARITY,
                f"the {plan} graph differs from torch by {error:.3g}, allowed is {bound:.3g}; delete the cache folder "
                "and start again, or set engine.kind to torch",
                metadata={"plan": str(plan), "error": f"{error:.3g}"},
            )


def parity_error(
    run_graph: RunGraph,
    plan: Plan,
    *,
    base: BaseModel,
    factors: SpectralFactors,
    rows: RowLayout,
    norms: Mapping[str, Tensor],
) -> float:
    """Largest absolute difference of the graph from torch, over the largest output or 1.

    Three samples, each with an adapter of its own: the base's row, and two with every singular value, norm weight and
    low-rank factor shifted at random. Under Plan.FULL the first confines itself and the third, and the second shares
    its attention.
    """
    latents, timesteps, cross, _ = example_inputs(base, _ROWS)
    index = torch.arange(_ROWS)
    spectral, lowrank = random_slabs(rows, factors, norms)
    unet = AdaptedUNet(base, factors, rows, plan, channels_last=False)
    guides = _example_guides(base) if plan is Plan.FULL else None
    inputs, added = (latents, timesteps, cross, index), example_added(base, _ROWS)
    with torch.no_grad():
        expected: tuple[Tensor, ...]
        if guides is not None:
            expected = unet.forward_guided(*inputs, guides, spectral, lowrank, added)
        else:
            expected = (unet(*inputs, None if plan is Plan.DENSE else spectral, lowrank, added),)
    found = run_graph(plan, *inputs, spectral, lowrank, guides, added)
    scale = max(1.0, float(expected[0].abs().max()))
    return max(float((one - other).abs().max()) / scale for one, other in zip(found, expected, strict=True))


def _example_guides(base: BaseModel) -> Guides:
    lag = torch.zeros(_ROWS, base.max_tokens)
    lag[0, 1:3] = 1
    return Guides(lag, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 2]))


def random_slabs(rows: RowLayout, factors: SpectralFactors, norms: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Spectral and low-rank rows of the base and of two adapters that shift everything at random, from a fixed seed."""
    generator = torch.Generator().manual_seed(_SEED)
    spectral = rows.base_spectral(factors, norms).repeat(_ROWS, 1)
    spectral[1:] *= 1 + 0.1 * torch.randn(spectral[1:].shape, generator=generator)
    lowrank = torch.zeros(_ROWS, rows.lowrank_size)
    lowrank[1:] = 0.02 * torch.randn(lowrank[1:].shape, generator=generator)
    return spectral, lowrank
