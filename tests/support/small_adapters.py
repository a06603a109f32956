"""A base layout of five layers and adapters for it, for tests that need no network."""

import torch

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.layout import BaseLayout, MatrixLayer, NormLayer

BASE_HASH = "ab" * 32
LAYOUT = BaseLayout(
    base_hash=BASE_HASH,
    matrices=(
        MatrixLayer("down.conv", (5, 3, 3, 3)),
        MatrixLayer("down.proj_out", (7, 5)),
        MatrixLayer("up.to_q", (4, 6)),
    ),
    norms=(NormLayer("down.norm", 5), NormLayer("up.norm", 7)),
    token_width=6,
)


def spectral_adapter(seed: int = 0, word: str = "sks") -> Adapter:
    """An adapter of two matrices, one norm and one word, in all three dtypes."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        kind=AdapterKind.SPECTRAL,
        base_hash=BASE_HASH,
        method="svdiff",
        spectral={
            "up.to_q": torch.randn(4, generator=draw),
            "down.conv": torch.randn(5, generator=draw).half(),
        },
        norm={"up.norm": torch.randn(7, generator=draw).bfloat16()},
        tokens={word: torch.randn(1, 6, generator=draw)} if word else {},
        identifier=word,
    )


def lowrank_adapter(seed: int = 0, rank: int = 2) -> Adapter:
    """An adapter of two low-rank layers."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        kind=AdapterKind.LOWRANK,
        base_hash=BASE_HASH,
        method="residuals",
        lowrank={
            "down.proj_out": LowRankFactors(
                torch.randn(rank, 5, generator=draw), torch.randn(7, rank, generator=draw), 0.5
            ),
            "up.to_q": LowRankFactors(
                torch.randn(1, 6, generator=draw).half(), torch.randn(4, 1, generator=draw).half(), -1.25
            ),
        },
    )


def tensors_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter by its name in a file."""
    found = {f"spectral/{layer}": tensor for layer, tensor in adapter.spectral.items()}
    found |= {f"norm/{layer}": tensor for layer, tensor in adapter.norm.items()}
    found |= {f"tokens/{word}": tensor for word, tensor in adapter.tokens.items()}
    for layer, part in adapter.lowrank.items():
        found |= {f"lowrank/{layer}/a": part.a, f"lowrank/{layer}/b": part.b}
    return found
