"""SDXL's added conditioning: what pooled text and picture sizes add to the time embedding, computed once per request.

It does not change over the steps (Podell et al. 2023, section 2.2), so the UNet takes the result as an input `added`
[N, width], and edits of `add_embedding` by adapters cost nothing per step, as those of keys and values do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.adapters.layout import BaseLayout
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossEdits, EditedLayers
from hueshift.engines.svd_cache import SpectralFactors

_FIRST, _SECOND = "add_embedding.linear_1", "add_embedding.linear_2"


def added_width(layout: BaseLayout) -> int:
    """Width of the UNet's input `added`, which is that of its time embedding; 0 if it takes none."""
    layer = layout.matrix(_SECOND)
    return 0 if layer is None else layer.rows


def make_time_ids(width: int, height: int) -> tuple[int, ...]:
    """The six numbers that SDXL takes for a picture of its own that nobody cropped or scaled.

    Original height and width, top and left of the crop, target height and width, all in pixels.
    """
    return (height, width, 0, 0, height, width)


class AddedStage:
    """Computes `added` with the base's weights and a mix's edits. Safe for several threads."""

    def __init__(self, base: BaseModel, factors: SpectralFactors) -> None:
        self._layers = EditedLayers(base, factors, (_FIRST, _SECOND))
        self._sinusoids: Any = base.unet.add_time_proj

    @torch.no_grad()
    def embed(self, pooled: Tensor, time_ids: Sequence[int], edits: CrossEdits) -> Tensor:
        """Return `added` [n, width] fp32 for pooled text [n, pooled width] fp32 and the sizes of the picture."""
        hidden = self._layers.run(_FIRST, self.features(pooled, time_ids), edits)
        return self._layers.run(_SECOND, functional.silu(hidden), edits)

    def features(self, pooled: Tensor, time_ids: Sequence[int]) -> Tensor:
        """What `add_embedding` reads: pooled text, then sinusoids of each number, [n, cols] fp32."""
        numbers = torch.tensor(time_ids, dtype=torch.float32, device=pooled.device)
        sizes: Tensor = self._sinusoids(numbers).flatten()
        return torch.cat([pooled, sizes.expand(len(pooled), -1)], -1)
