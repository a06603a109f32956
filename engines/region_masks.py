"""Where the regions of a picture are: rectangles and grey pictures become masks at the latents' size."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels from the upper left corner, within the picture."""

    x: int
    y: int
    width: int
    height: int


Area = Box | bytes
"""A rectangle, or a grey PNG of ours that is stretched to the picture: white is in, black is out."""


def make_masks(areas: Sequence[tuple[Area, float]], width: int, height: int, factor: int) -> list[Tensor]:
    """Masks [h, w] fp32, one for each area with its feather in pixels, of a picture whose latents are 1/`factor` of it.

    A latent position has the mean of its pixels. Where masks add up to more than 1 they are divided by their sum.
    """
    masks = [_soften(_draw(area, width, height), feather) for area, feather in areas]
    small = [functional.avg_pool2d(mask[None, None], factor)[0, 0] for mask in masks]
    total = torch.stack(small).sum(0).clamp(min=1) if small else None
    # Rounding may leave a sum a last bit above 1, which a blend does not feel.
    return [mask if total is None else mask / total for mask in small]


def _draw(area: Area, width: int, height: int) -> Tensor:
    """One area at the picture's size [height, width], 0 to 1."""
    if isinstance(area, Box):
        mask = torch.zeros(height, width)
        mask[area.y : area.y + area.height, area.x : area.x + area.width] = 1
        return mask
    with Image.open(io.BytesIO(area), formats=("PNG",)) as picture:
        grey = picture.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)


def _soften(mask: Tensor, feather: float) -> Tensor:
    """Blur with a square of `feather` pixels, so that a sharp edge becomes a straight ramp of that width.

    The picture's own border does not fade: what is beyond it is taken to be as its last pixels are.
    """
    radius = round(feather / 2)
    if radius == 0:
        return mask
    return _running_mean(_running_mean(mask.double(), radius).t(), radius).t().float().clamp(0, 1)


def _running_mean(rows: Tensor, radius: int) -> Tensor:
    """Mean over 2 radius + 1 values around each value of [n, m], by differences of sums: no cost for a large radius."""
    side = 2 * radius + 1
    sums = functional.pad(rows[None], (radius + 1, radius), mode="replicate")[0].cumsum(-1)
    return (sums[:, side:] - sums[:, :-side]) / side
