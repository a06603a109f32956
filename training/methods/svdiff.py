"""SVDiff (Han et al. 2023): shifts of all singular values, and of the weights of all norms; never of biases."""

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.learnable import Constant, Learned, Rows, Values
from hueshift.training.spec import Method, TrainingSpec

_HOST = torch.device("cpu")


class SpectralShifts:
    """The shifts, flat, in the order of a spectral row."""

    plan = Plan.FACTORED

    def __init__(self, layout: RowLayout, factors: SpectralFactors, norms: Values, spec: TrainingSpec) -> None:
        self.layout = layout
        self._spec = spec
        self._base = Constant(layout.base_spectral(factors, norms))
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
        shifts = torch.cat([values["sigma"], values["norm"]])
        row = self._base.on(shifts.device) + shifts
        return Rows(torch.cat([row[: self._sigma_size].relu(), row[self._sigma_size :]])[None])

    def base_rows(self) -> Rows:
        """Sigma and norm weights."""
        return Rows(self._base.on(_HOST)[None])

    def adapter(self, values: Values) -> Learned:
        """Cut the flat shifts into layers."""
        shifts = torch.cat([values["sigma"], values["norm"]]).detach().cpu()
        layout = self.layout.layout
        parts = {name: shifts[begin:end].clone() for name, begin, end in layout.spans()}
        adapter = Adapter(
            kind=AdapterKind.SPECTRAL,
            base_hash=layout.base_hash,
            method=Method.SVDIFF,
            spectral={name: part for name, part in parts.items() if name in layout.matrix_offsets},
            norm={name: part for name, part in parts.items() if name in layout.norm_offsets},
        )
        return Learned(adapter)
