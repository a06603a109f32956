"""What each method learns: named tensors, the engine rows they make, and the adapter they become.

Values travel as plain dicts of tensors, so that the same functions serve the tensors in training and their moving
average.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.spec import Method, TrainingSpec

Values = Mapping[str, Tensor]
Rows = tuple[Tensor | None, Tensor | None]

# The output projection of each transformer block, with rank max(1, 0.05 m) for m output features (Ham et al. 2024,
# section 3.1).
RESIDUAL_TARGET = "proj_out"
RESIDUAL_RANK_SHARE = 0.05


class Learnable(Protocol):
    """One method's trainable tensors."""

    @property
    def plan(self) -> Plan:
        """Plan that the rows need."""
        ...

    @property
    def layout(self) -> RowLayout:
        """Layout of the rows."""
        ...

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the tensors at step 0, which leave the base model as it is."""
        ...

    def learning_rate(self, name: str) -> float:
        """Peak learning rate of a tensor."""
        ...

    def rows(self, values: Values) -> Rows:
        """Make the spectral and low-rank rows [1, size] of `values`, differentiable with respect to them."""
        ...

    def base_rows(self) -> Rows:
        """Return the rows of the base model itself."""
        ...

    def adapter(self, values: Values, tokens: Mapping[str, Tensor], identifier: str) -> Adapter:
        """Make the adapter."""
        ...


class SpectralShifts:
    """SVDiff (Han et al. 2023): shifts of all singular values, and of the weights of all norms; never of biases."""

    plan = Plan.FACTORED

    def __init__(self, layout: RowLayout, factors: SpectralFactors, norms: Values, spec: TrainingSpec) -> None:
        self.layout = layout
        self._spec = spec
        self._base = layout.base_spectral(factors, norms)
        self._sigma_size = layout.layout.sigma_size

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros: `sigma` [sigma_size] and `norm` [all norm weights]."""
        return {
            "sigma": torch.zeros(self._sigma_size),
            "norm": torch.zeros(self.layout.spectral_size - self._sigma_size),
        }

    def learning_rate(self, name: str) -> float:
        """Norm weights have their own: they are near 1, singular values up to about 20."""
        return self._spec.learning_rate if name == "sigma" else self._spec.norm_learning_rate

    def rows(self, values: Values) -> Rows:
        """Effective values: relu(sigma + delta), w + shift."""
        row = self._base + torch.cat([values["sigma"], values["norm"]])
        return torch.cat([row[: self._sigma_size].relu(), row[self._sigma_size :]])[None], None

    def base_rows(self) -> Rows:
        """Sigma and norm weights."""
        return self._base[None], None

    def adapter(self, values: Values, tokens: Mapping[str, Tensor], identifier: str) -> Adapter:
        """Cut the flat shifts into layers."""
        shifts = torch.cat([values["sigma"], values["norm"]]).detach()
        layout = self.layout.layout
        parts = {name: shifts[begin:end].clone() for name, begin, end in layout.spans()}
        return Adapter(
            kind=AdapterKind.SPECTRAL,
            base_hash=layout.base_hash,
            method=Method.SVDIFF,
            spectral={name: part for name, part in parts.items() if name in layout.matrix_offsets},
            norm={name: part for name, part in parts.items() if name in layout.norm_offsets},
            tokens=tokens,
            identifier=identifier,
        )


class Residuals:
    """Personalized Residuals (Ham et al. 2024): B A added to the output projection of each transformer block.

    The paper does not say how the factors start. Here A is Gaussian with variance 1/cols and B zero, as in LoRA (Hu et
    al. 2021), so that step 0 is the base model.
    """

    plan = Plan.DENSE

    def __init__(self, layout: RowLayout, spec: TrainingSpec) -> None:
        self.layout = layout
        self._spec = spec
        self.ranks = {target.name: residual_rank(target.rows, target.cols) for target in layout.targets}

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """`a/<layer>` [rank, cols] and `b/<layer>` [rows, rank]."""
        values: dict[str, Tensor] = {}
        for target in self.layout.targets:
            rank = self.ranks[target.name]
            values[f"a/{target.name}"] = torch.randn(rank, target.cols, generator=generator) / math.sqrt(target.cols)
            values[f"b/{target.name}"] = torch.zeros(target.rows, rank)
        return values

    def learning_rate(self, name: str) -> float:
        """One for all."""
        return self._spec.learning_rate

    def rows(self, values: Values) -> Rows:
        """A and B of every target, padded to the layout's ranks."""
        factors = {t.name: (values[f"a/{t.name}"], values[f"b/{t.name}"]) for t in self.layout.targets}
        return None, self.layout.pack_lowrank(factors)[None]

    def base_rows(self) -> Rows:
        """No branch at all."""
        return None, None

    def adapter(self, values: Values, tokens: Mapping[str, Tensor], identifier: str) -> Adapter:
        """Take the factors as they are."""
        return Adapter(
            kind=AdapterKind.LOWRANK,
            base_hash=self.layout.layout.base_hash,
            method=Method.RESIDUALS,
            lowrank={
                t.name: LowRankFactors(values[f"a/{t.name}"].detach().clone(), values[f"b/{t.name}"].detach().clone())
                for t in self.layout.targets
            },
            tokens=tokens,
            identifier=identifier,
        )


def residual_rank(rows: int, cols: int) -> int:
    """Rank of the residual on a `rows` x `cols` matrix."""
    return max(1, min(math.floor(RESIDUAL_RANK_SHARE * rows), cols))
