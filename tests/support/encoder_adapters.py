"""Adapters that change the text encoder, and the truth that prompts must meet: encoders rebuilt in fp64."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, EncoderChange, LowRankFactors
from hueshift.adapters.layout import BaseLayout
from hueshift.engines.base_model import BaseModel
from hueshift.engines.encoder_layers import encoders_of, locate_weights


def encoder_adapter(layout: BaseLayout, seed: int = 0, kind: AdapterKind = AdapterKind.SPECTRAL) -> Adapter:
    """Shift all of the text encoders, by enough to clamp some singular values; or put a product on each matrix."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    norm = {layer.name: 0.1 * noise(layer.size) for layer in layout.encoder_norms}
    matrices = layout.encoder_matrices
    if kind is AdapterKind.SPECTRAL:
        change = EncoderChange({layer.name: 0.3 * noise(layer.rank) for layer in matrices}, norm)
    else:
        factors = {m.name: LowRankFactors(noise(2, m.cols), 0.02 * noise(m.rows, 2), 0.5) for m in matrices}
        change = EncoderChange(norm=norm, lowrank=factors)
    return Adapter(kind, layout.base_hash, "svdiff", encoder=change)


def tune_encoders(base: BaseModel, *mix: tuple[Adapter, float]) -> BaseModel:
    """The base with text encoders rebuilt in fp64: relu(sigma + sum w d), norms w + sum, matrices W + sum w s B A."""
    copies = [copy.deepcopy(encoder) for encoder in encoders_of(base)]
    changes = [(adapter.encoder, weight) for adapter, weight in mix]
    for name, (number, parameter) in locate_weights(copies).items():
        weight = copies[number].get_parameter(parameter)
        made = weight.detach().double()
        deltas = [w * change.spectral[name].double() for change, w in changes if name in change.spectral]
        if deltas:
            u, sigma, vh = torch.linalg.svd(made, full_matrices=False)
            made = (u * (sigma + torch.stack(deltas).sum(0)).relu()) @ vh
        made = made + sum((w * change.norm[name].double() for change, w in changes if name in change.norm), 0.0)
        for change, w in changes:
            if name in change.lowrank:
                factors = change.lowrank[name]
                made = made + w * factors.scale * factors.b.double() @ factors.a.double()
        weight.data.copy_(made)
    xl = None if base.xl is None else replace(base.xl, text_encoder=copies[1])
    return replace(base, text_encoder=copies[0], xl=xl)
