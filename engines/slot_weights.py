"""Whole weights of every adapter slot, for the layers where that is the cheapest form of an adapter.

A linear layer of rank C that sees T tokens of a picture pays 2 T C^2 for its second product, in every step and sample
of the factored plan; putting its W' together pays 2 C^3, once, when a slot is loaded. On large pictures T is larger
than C (SD1.5 at 512 pixels: 4096 against 320, 1024 against 640), so these layers keep a weight for each slot, low-rank
branches merged in, and kernels/slot_linear.py lets each sample read its own: 107 layers, 110 MB and 63 GFLOP a slot, in
the place of 89 GFLOP a sample and step (counted).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.interface import BASE_SLOT, EngineRow
from hueshift.engines.merged_weights import WeightWriter, written_matrix
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import is_text_side

# Elements of two bytes on a boundary of 16.
_ALIGNED = 8


class SlotWeights:
    """`weights` [slots, rows, cols] by layer, allocated once; they never move. Slots that were not loaded hold zeros.

    `prepare` must come before anything is loaded. For one stream at a time.
    """

    def __init__(
        self, layers: Sequence[MatrixLayer], rows: RowLayout, slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layers, self._rows, self._slots = tuple(layers), rows, slots
        self.weights = {
            layer.name: torch.zeros(slots, layer.rows, layer.cols, device=device, dtype=dtype) for layer in layers
        }
        self._writers: list[WeightWriter] = []

    def prepare(self, pristine: Mapping[str, Tensor], factors: SpectralFactors) -> None:
        """Put the base's weights into its slot, and make ready to write the others.

        `pristine` are the base's parameters by the network's names (`unet.<layer>.weight`).
        """
        bases = {layer.name: pristine[f"unet.{layer.name}.weight"].detach().flatten(1) for layer in self._layers}
        for name, base in bases.items():
            self.weights[name][BASE_SLOT].copy_(base)
        layout, weights = self._rows.layout, self.weights
        firsts = [
            written_matrix(layer, layout, factors, bases[layer.name], weights[layer.name][BASE_SLOT + 1])
            for layer in self._layers
        ]
        for slot in range(BASE_SLOT + 1, self._slots if firsts else 0):
            like = self._writers[0] if self._writers else None
            # Those after the first share its packed factors.
            matrices = [replace(one, layer=replace(one.layer, out=weights[one.name][slot])) for one in firsts]
            self._writers.append(WeightWriter(layout, self._rows, matrices, {}, like=like))

    def write(self, slot: int, row: EngineRow) -> None:
        """Queue the weights of a row that has both parts, on the current stream."""
        if self._writers:
            self._writers[slot - BASE_SLOT - 1].write(row)


def choose_layers(layout: BaseLayout, levels: int, side: int, slots: int, element: int, most: int) -> list[MatrixLayer]:
    """Layers that see at least as many positions as they have singular values on a picture of side x side latents, of a
    UNet of `levels` sizes: those of the largest pictures first, as many levels as `most` bytes hold for all slots.
    """
    by_level: dict[int, list[MatrixLayer]] = {}
    for layer, level in _products(layout, levels):
        if (side >> level) ** 2 >= layer.rank:
            by_level.setdefault(level, []).append(layer)
    chosen: list[MatrixLayer] = []
    for level in sorted(by_level):
        more = [*chosen, *by_level[level]]
        if slots * element * sum(layer.rows * layer.cols for layer in more) > most:
            break
        chosen = more
    return chosen


def _products(layout: BaseLayout, levels: int) -> Iterator[tuple[MatrixLayer, int]]:
    """Linear layers and 1x1 convolutions that read a picture, and how often it was halved before them."""
    for layer in layout.matrices:
        block, _, rest = layer.name.partition(".")
        number = rest.partition(".")[0]
        # A time embedding is one token, and keys and values of the prompt are made before.
        if not layer.is_pointwise or "time_emb" in layer.name or is_text_side(layer.name):
            continue
        # A slot's weight must begin where vector reads may.
        if layer.rows * layer.cols % _ALIGNED:
            continue
        if block == "down_blocks":
            yield layer, int(number)
        elif block == "up_blocks":
            yield layer, levels - 1 - int(number)
        elif block == "mid_block":
            yield layer, levels - 1
