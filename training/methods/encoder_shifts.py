"""SVDiff's shifts of the text encoder: of all singular values of its transformer, and of the weights of its norms."""

import torch
from torch import Tensor

from hueshift.adapters.adapter import EncoderChange
from hueshift.engines.base_model import BaseModel
from hueshift.engines.encoder_weights import EncoderAssembly, TowerWeights
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.learnable import Values
from hueshift.training.spec import TrainingSpec

SIGMA, NORM = "encoder_sigma", "encoder_norm"


class EncoderShifts:
    """The shifts, flat, in the order of the layout: `encoder_sigma` and `encoder_norm` among a job's values.

    Weights are put together once for each batch: with their gradients that costs about what encoding five hundred
    tokens does, and it is what serving does with them.
    """

    def __init__(self, base: BaseModel, factors: SpectralFactors, spec: TrainingSpec) -> None:
        layout = base.layout
        self._matrices = {layer.name: layer.rank for layer in layout.encoder_matrices}
        self._norms = {layer.name: layer.size for layer in layout.encoder_norms}
        self._assembly = EncoderAssembly(base, factors.encoder)
        rate = spec.text_encoder_learning_rate
        # The norms of the text encoder stand to its singular values as those of the UNet do.
        self.rates = {SIGMA: rate, NORM: rate * spec.norm_learning_rate / spec.learning_rate}

    def initial(self) -> dict[str, Tensor]:
        """Zeros, which leave the text encoder as it is."""
        return {SIGMA: torch.zeros(sum(self._matrices.values())), NORM: torch.zeros(sum(self._norms.values()))}

    def weights(self, values: Values) -> TowerWeights:
        """Weights of the text encoders under `values`, differentiable with respect to them."""
        return self._assembly.put_together(
            _cut(values[SIGMA], self._matrices), _cut(values[NORM], self._norms), branches={}
        )

    def change(self, values: Values) -> EncoderChange:
        """The adapter's part."""
        sigma, norm = (values[name].detach().cpu().clone() for name in (SIGMA, NORM))
        return EncoderChange(
            {name: part.clone() for name, part in _cut(sigma, self._matrices).items()},
            {name: part.clone() for name, part in _cut(norm, self._norms).items()},
        )


def _cut(flat: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, torch.split(flat, list(sizes.values())), strict=True))


def make_encoder_shifts(base: BaseModel, factors: SpectralFactors, spec: TrainingSpec) -> EncoderShifts | None:
    """The shifts of a job that trains the text encoder, else None."""
    return EncoderShifts(base, factors, spec) if spec.train_text_encoder else None
