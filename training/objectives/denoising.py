"""The denoising error itself, and which timesteps it is asked at."""

import torch
from torch import Tensor

# Share of rows that hold the base's fine detail.
ANCHOR_SHARE = 0.125


def draw_timesteps(count: int, train_steps: int, anchor_below: int, generator: torch.Generator) -> Tensor:
    """Draw `count` timesteps [count] int64, one from each of `count` equally likely strata, in random order.

    A share ANCHOR_SHARE falls evenly below `anchor_below`, where the base's own output is the target; the others are
    dense where noise is high: above it P(T <= t) grows with t^2. What a thing is gets decided at high noise, and a
    short run has no steps to spare. Strata spread a batch of four over all noise levels.
    """
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    share = ANCHOR_SHARE if anchor_below else 0.0
    low = anchor_below * strata / ANCHOR_SHARE
    high = (anchor_below**2 + (strata - share) / (1 - share) * (train_steps**2 - anchor_below**2)).clamp(min=0).sqrt()
    timesteps = torch.where(strata < share, low, high).long().clamp(max=train_steps - 1)
    return timesteps[torch.randperm(count, generator=generator)]


def denoising_loss(target: Tensor, weights: Tensor, output: Tensor, pixel_weights: Tensor | None = None) -> Tensor:
    """Mean squared error of the model's `output` [n, 4, h, w] against `target`, weighted by row, as a scalar.

    With `pixel_weights` [n, 1, h, w], none of whose rows may be all zeros, a row's error is the weighted mean over its
    positions: a small mask counts as much as a large one.
    """
    error = (output.float() - target).square()
    if pixel_weights is None:
        return (error.mean(dim=(1, 2, 3)) * weights).sum()
    by_row = (error.mean(dim=1, keepdim=True) * pixel_weights).sum(dim=(1, 2, 3)) / pixel_weights.sum(dim=(1, 2, 3))
    return (by_row * weights).sum()
