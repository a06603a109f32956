"""Offset noise (Guttenberg 2023, "Diffusion with offset noise"): lets a short training change overall brightness.

White noise hardly touches a picture's mean, so a model trained on it keeps the mean it sees in the noisy picture.
"""

from dataclasses import replace

import torch

from hueshift.training.objectives.objective import Batch, Draws, Objective


class OffsetNoise(Objective):
    """Adds `strength` times one Gaussian number to each channel of each row's noise."""

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def noised(self, batch: Batch, draws: Draws) -> Batch:
        """Shift the noise. The target follows it, as it is made of the noise."""
        shape = (*batch.noise.shape[:2], 1, 1)
        shift = torch.randn(shape, generator=draws.generator)
        return replace(batch, noise=batch.noise + self._strength * shift)
