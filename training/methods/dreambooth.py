"""DreamBooth (Ruiz et al. 2023): whole weights are trained, and their change is what serves: whole, or of a low rank.

Biases and norms stay the base's, 0.05 % of SD1.5's UNet: no part of an adapter holds a bias, and changed norms would
make a low-rank adapter run factored. So training is the same whatever the rank (docs/training.md).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.errors import InvalidArgument
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.text_side import is_text_side
from hueshift.training.methods.compression import compress_deltas
from hueshift.training.methods.full_weights import WeightDeltas
from hueshift.training.methods.learnable import Learned, Values
from hueshift.training.spec import Method, TrainingSpec


class DreamBooth(WeightDeltas):
    """The matrices of all layers that `spec.targets` names by their endings; of all layers, if it names none.

    `spec.rank` 0 publishes the whole change.
    """

    def __init__(self, layout: BaseLayout, unet: nn.Module, spec: TrainingSpec) -> None:
        """Raises InvalidArgument naming `settings.targets` if an ending fits no layer."""
        super().__init__(layout, unet, _chosen(layout, spec.targets), spec.learning_rate)
        self._rank = spec.rank

    def adapter(self, values: Values) -> Learned:
        """Compress every delta to the job's rank, or round it to fp16: SD1.5's are 1.7 GB so, twice that in fp32."""
        if self._rank == 0:
            return Learned(self._whole(self.deltas(values)))
        factors, kept = compress_deltas(self.deltas(values), self._rank)
        adapter = Adapter(
            kind=AdapterKind.LOWRANK,
            base_hash=self.layout.layout.base_hash,
            method=Method.DREAMBOOTH,
            lowrank=factors,
        )
        return Learned(adapter, kept)

    def _whole(self, deltas: Mapping[str, Tensor]) -> Adapter:
        written = {name: _rounded(delta) for name, delta in deltas.items() if bool(delta.any())}
        kv = {name: delta for name, delta in written.items() if is_text_side(name)}
        # What only the prompt reads is served by every engine, beside other mixes.
        prompts_alone = all(is_text_side(layer.name) for layer in self.layers)
        return Adapter(
            kind=AdapterKind.KV if prompts_alone else AdapterKind.DENSE,
            base_hash=self.layout.layout.base_hash,
            method=Method.DREAMBOOTH,
            kv=kv,
            dense={name: delta for name, delta in written.items() if name not in kv},
        )


def _rounded(delta: Tensor) -> Tensor:
    """The nearest fp16 on the CPU; fp32 where that would overflow, because no file may hold infinities."""
    half = delta.to(torch.float16)
    return (half if bool(torch.isfinite(half).all()) else delta.clone()).cpu()


def _chosen(layout: BaseLayout, endings: Iterable[str]) -> list[MatrixLayer]:
    chosen: set[str] = set()
    for ending in endings:
        fitting = {layer.name for layer in layout.matrices if layer.name == ending or layer.name.endswith(f".{ending}")}
        if not fitting:
            raise InvalidArgument.for_field("settings.targets", f"{ending!r} fits no layer of this base model")
        chosen |= fitting
    return [layer for layer in layout.matrices if not chosen or layer.name in chosen]
