"""Custom Diffusion (Kumari et al. 2023): keys and values of cross-attention, and the word.

The changes depend on the prompt alone, so what serves them costs nothing per step. They are stored whole, or, with a
rank, as the best products of that rank (section 3.3 of the paper does the same to merge and to save space).
"""

from torch import nn

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.layout import BaseLayout
from hueshift.training.methods.compression import compress_deltas
from hueshift.training.methods.full_weights import WeightDeltas
from hueshift.training.methods.learnable import Learned, Values
from hueshift.training.spec import Method, TrainingSpec


class CustomDiffusion(WeightDeltas):
    """to_k and to_v of every cross-attention. `spec.rank` 0 keeps the deltas whole."""

    def __init__(self, layout: BaseLayout, unet: nn.Module, spec: TrainingSpec) -> None:
        names = {f"{name}.{part}" for name in layout.cross_attentions for part in ("to_k", "to_v")}
        layers = [layer for layer in layout.matrices if layer.name in names]
        super().__init__(layout, unet, layers, spec.learning_rate)
        self._rank = spec.rank

    def adapter(self, values: Values) -> Learned:
        """Store the deltas."""
        deltas = self.deltas(values)
        base_hash, method = self.layout.layout.base_hash, Method.CUSTOM_DIFFUSION
        if self._rank == 0:
            kv = {name: delta.cpu().clone() for name, delta in deltas.items()}
            return Learned(Adapter(kind=AdapterKind.KV, base_hash=base_hash, method=method, kv=kv))
        factors, kept = compress_deltas(deltas, self._rank)
        lowrank = Adapter(kind=AdapterKind.LOWRANK, base_hash=base_hash, method=method, lowrank=factors)
        return Learned(lowrank, kept)
