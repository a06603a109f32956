"""An adapter in memory: what one user taught the base model, as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only for annotations: looking at a file must not wait for torch.
    from torch import Tensor


class AdapterKind(StrEnum):
    """What an adapter mainly is. Spectral and low-rank ones may also shift norm weights, and all may teach words."""

    SPECTRAL = "spectral"
    LOWRANK = "lowrank"
    TOKENS = "tokens"
    """Learned words alone (Textual Inversion); the UNet is unchanged."""


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """W' = W + scale * B A for one layer: A is [rank, cols], B is [rows, rank]."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One adapter, bound to the base model whose hash it names.

    `spectral` maps a matrix layer to the shifts of its singular values [rank]; `norm` maps a norm layer to the shifts
    of its weights [size]. `lowrank` maps a matrix layer to its factors. `tokens` maps a placeholder word to its learned
    embeddings [vectors, token_width]. Absent layers are unchanged.
    """

    kind: AdapterKind
    base_hash: str
    method: str
    spectral: Mapping[str, Tensor] = field(default_factory=dict)
    norm: Mapping[str, Tensor] = field(default_factory=dict)
    lowrank: Mapping[str, LowRankFactors] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    identifier: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        plain = [*self.spectral.values(), *self.norm.values(), *self.tokens.values()]
        factors = [t for f in self.lowrank.values() for t in (f.a, f.b)]
        return sum(t.numel() * t.element_size() for t in (*plain, *factors))
