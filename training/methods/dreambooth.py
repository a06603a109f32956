"""DreamBooth (Ruiz et al. 2023): whole weights are trained. What serves is their change, brought to a low rank.

Biases and norms stay the base's: no engine serves changed biases, and changed norms alone would make the whole UNet run
factored.
"""

from collections.abc import Iterable

from torch import nn

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.errors import InvalidArgument
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.training.methods.compression import compress_deltas
from hueshift.training.methods.full_weights import WeightDeltas
from hueshift.training.methods.learnable import Learned, Values
from hueshift.training.spec import Method, TrainingSpec


class DreamBooth(WeightDeltas):
    """The matrices of all layers that `spec.targets` names by their endings; of all layers, if it names none."""

    def __init__(self, layout: BaseLayout, unet: nn.Module, spec: TrainingSpec) -> None:
        """Raises InvalidArgument naming `settings.targets` if an ending fits no layer."""
        super().__init__(layout, unet, _chosen(layout, spec.targets), spec.learning_rate)
        self._rank = spec.rank

    def adapter(self, values: Values) -> Learned:
        """Compress every delta to the job's rank."""
        factors, kept = compress_deltas(self.deltas(values), self._rank)
        adapter = Adapter(
            kind=AdapterKind.LOWRANK,
            base_hash=self.layout.layout.base_hash,
            method=Method.DREAMBOOTH,
            lowrank=factors,
        )
        return Learned(adapter, kept)


def _chosen(layout: BaseLayout, endings: Iterable[str]) -> list[MatrixLayer]:
    chosen: set[str] = set()
    for ending in endings:
        fitting = {layer.name for layer in layout.matrices if layer.name == ending or layer.name.endswith(f".{ending}")}
        if not fitting:
            raise InvalidArgument.for_field("settings.targets", f"{ending!r} fits no layer of this base model")
        chosen |= fitting
    return [layer for layer in layout.matrices if not chosen or layer.name in chosen]
