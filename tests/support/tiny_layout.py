"""A base model's layout of one matrix and one norm, and adapters for it whose rows sum to a number of our choice."""

import torch

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.layout import BaseLayout, MatrixLayer, NormLayer
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors

BASE_HASH = "0" * 64
LAYER, NORM, TARGET = "block.to_q", "block.norm", "block.proj_out"


def tiny_rows(token_width: int = 4) -> tuple[RowLayout, SpectralFactors, dict[str, torch.Tensor]]:
    """Row layout, factors and norms. All singular values and norm weights are zero, so rows hold the shifts alone."""
    layout = BaseLayout(
        BASE_HASH, (MatrixLayer(LAYER, (3, 2)), MatrixLayer(TARGET, (2, 2))), (NormLayer(NORM, 2),), token_width
    )
    sizes = {LAYER: (3, 2), TARGET: (2, 2)}
    factors = SpectralFactors(
        u={name: torch.zeros(rows, 2) for name, (rows, _) in sizes.items()},
        sigma={name: torch.zeros(2) for name in sizes},
        vh={name: torch.zeros(2, cols) for name, (_, cols) in sizes.items()},
    )
    return RowLayout(layout, ("proj_out",), 2), factors, {NORM: torch.zeros(2)}


def spectral_adapter(mark: float, tokens: dict[str, torch.Tensor] | None = None) -> Adapter:
    """An adapter whose row sums to `mark` at weight 1. Needs the factored plan."""
    shift = torch.tensor([mark, 0.0])
    return Adapter(AdapterKind.SPECTRAL, BASE_HASH, "svdiff", norm={NORM: shift}, tokens=tokens or {})


def dense_adapter(mark: float) -> Adapter:
    """An adapter whose row sums to `mark` at weight 1. Needs weights of its own."""
    delta = torch.tensor([[mark, 0.0], [0.0, 0.0]])
    return Adapter(AdapterKind.DENSE, BASE_HASH, "dreambooth", dense={TARGET: delta})


def lowrank_adapter(mark: float, tokens: dict[str, torch.Tensor] | None = None) -> Adapter:
    """An adapter whose row sums to `mark` at weight 1. Runs under either plan."""
    # A sums to 0, so that only B counts.
    factors = LowRankFactors(a=torch.tensor([[1.0, -1.0]]), b=torch.tensor([[mark], [0.0]]))
    return Adapter(AdapterKind.LOWRANK, BASE_HASH, "residuals", lowrank={TARGET: factors}, tokens=tokens or {})
