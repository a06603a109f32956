"""Whole matrices in training, as their difference from the base: what DreamBooth and Custom Diffusion share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.training.methods.learnable import Rows, Values


class WeightDeltas:
    """W + delta on each of `layers`; deltas start at zero and are as large as the weights."""

    plan = Plan.DENSE

    def __init__(
        self, layout: BaseLayout, unet: nn.Module, layers: Sequence[MatrixLayer], learning_rate: float
    ) -> None:
        self.layout = RowLayout(layout, (), 1)
        self.layers = tuple(layers)
        self._learning_rate = learning_rate
        self._base = {layer.name: unet.get_parameter(f"{layer.name}.weight").detach() for layer in layers}

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """`delta/<layer>` [rows, cols], fp32."""
        return {f"delta/{layer.name}": torch.zeros(layer.rows, layer.cols) for layer in self.layers}

    def learning_rate(self, name: str) -> float:
        """One for all."""
        return self._learning_rate

    def rows(self, values: Values) -> Rows:
        """The changed weights."""
        return Rows(
            weights={
                name: base + values[f"delta/{name}"].to(base.device).view(base.shape)
                for name, base in self._base.items()
            }
        )

    def base_rows(self) -> Rows:
        """The base's own."""
        return Rows()

    def deltas(self, values: Values) -> dict[str, Tensor]:
        """What was learned, [rows, cols] by layer."""
        return {layer.name: values[f"delta/{layer.name}"].detach() for layer in self.layers}
