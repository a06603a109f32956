"""The middle of a step on a network that is nothing but differentiable."""

import torch
from torch import Tensor

from hueshift.training.methods.learnable import Rows
from hueshift.training.sharing.captured import Middle


def plain(noisy: Tensor, timesteps: Tensor, context: Tensor, rows: Rows) -> Tensor:
    """A UNet that is nothing but differentiable."""
    assert rows.spectral is not None
    return noisy * context.mean(dim=(1, 2))[:, None, None, None] + rows.spectral.sum() + timesteps.sum()


def middle_of(size: int) -> Middle:
    """A batch of so many samples, with one row for all of them."""
    generator = torch.Generator().manual_seed(size)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = Rows(spectral=some(1, 3))
    return Middle(some(size, 4, 2, 2), torch.ones(size), some(size, 4, 2, 2), some(size), some(size, 5, 6), rows)
