"""Random adapters of the embedded base model, strong enough to change its pictures a good deal."""

import torch

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors


def random_spectral(base: BaseModel, factors: SpectralFactors, seed: int, word: str = "") -> Adapter:
    """Shifts of a tenth of each singular value, and a learned word if one is named."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        AdapterKind.SPECTRAL,
        base.base_hash,
        "svdiff",
        spectral={name: 0.1 * s * torch.randn(s.shape, generator=draw) for name, s in factors.sigma.items()},
        norm={layer.name: 0.05 * torch.randn(layer.size, generator=draw) for layer in base.layout.norms},
        tokens={word: 0.05 * torch.randn(1, base.layout.token_width, generator=draw)} if word else {},
    )


def random_lowrank(base: BaseModel, rows: RowLayout, seed: int, rank: int = 4) -> Adapter:
    """Products of rank `rank` on every target of the engine."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        AdapterKind.LOWRANK,
        base.base_hash,
        "residuals",
        lowrank={
            target.name: LowRankFactors(
                0.05 * torch.randn(rank, target.cols, generator=draw),
                0.3 * torch.randn(target.rows, rank, generator=draw),
            )
            for target in rows.targets
        },
    )
