"""Low-rank branches in training: what residuals and LoRA share."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.learnable import Learned, Rows, Values
from hueshift.training.spec import Method

Factors = tuple[Tensor, Tensor]


class Branches:
    """y = Wx + scale B(Ax) on every target of `layout`, with the ranks of `ranks` by layer.

    A starts Gaussian with variance 1/cols, so that |Ax| is about |x| whatever the rank, and B at zero (Hu et al. 2021),
    so that step 0 is the base. With `principal` they start at the base's strongest singular triples instead, which are
    taken off again (`pissa`).
    """

    plan = Plan.DENSE

    def __init__(
        self,
        method: Method,
        layout: RowLayout,
        ranks: Mapping[str, int],
        learning_rate: float,
        *,
        scale: float = 1.0,
        principal: Mapping[str, Factors] | None = None,
    ) -> None:
        self.layout = layout
        self.ranks = ranks
        self._method, self._learning_rate, self._scale = method, learning_rate, scale
        self._principal = principal or {}

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """`a/<layer>` [rank, cols] and `b/<layer>` [rows, rank]."""
        values: dict[str, Tensor] = {}
        for target in self.layout.targets:
            rank = self.ranks[target.name]
            if target.name in self._principal:
                a, b = self._principal[target.name]
            else:
                a = torch.randn(rank, target.cols, generator=generator) / math.sqrt(target.cols)
                b = torch.zeros(target.rows, rank)
            values[f"a/{target.name}"], values[f"b/{target.name}"] = a, b
        return values

    def learning_rate(self, name: str) -> float:
        """One for all."""
        return self._learning_rate

    def rows(self, values: Values) -> Rows:
        """A and B of every target, padded to the layout's ranks, the scale in B."""
        factors = {name: (a, b * self._scale) for name, (a, b) in self._changes(values).items()}
        return Rows(lowrank=self.layout.pack_lowrank(factors)[None])

    def base_rows(self) -> Rows:
        """No branch at all."""
        return Rows()

    def adapter(self, values: Values) -> Learned:
        """Take the factors as they are."""
        adapter = Adapter(
            kind=AdapterKind.LOWRANK,
            base_hash=self.layout.layout.base_hash,
            method=self._method,
            lowrank={
                name: LowRankFactors(a.detach().clone(), b.detach().clone(), self._scale)
                for name, (a, b) in self._changes(values).items()
            },
        )
        return Learned(adapter)

    def _changes(self, values: Values) -> dict[str, Factors]:
        """Factors of the change from the pristine base: what is learned, less what it started from."""
        changes: dict[str, Factors] = {}
        for target in self.layout.targets:
            a, b = values[f"a/{target.name}"], values[f"b/{target.name}"]
            if target.name in self._principal:
                first_a, first_b = self._principal[target.name]
                a, b = torch.cat([a, first_a]), torch.cat([b, -first_b], 1)
            changes[target.name] = (a, b)
        return changes


def pissa(factors: SpectralFactors, ranks: Mapping[str, int], scale: float) -> dict[str, Factors]:
    """A = sqrt(S_r / scale) V_r^T and B = U_r sqrt(S_r / scale) of each layer (PiSSA, Meng et al. 2024, section 3).

    `scale` B A is then the best approximation of rank r of the base's matrix; the base stays as it is, so the change is
    scale (B A - B_0 A_0), of rank 2r.
    """
    found: dict[str, Factors] = {}
    for name, rank in ranks.items():
        root = (factors.sigma[name][:rank] / scale).sqrt()
        found[name] = (root[:, None] * factors.vh[name][:rank], factors.u[name][:, :rank] * root)
    return found
