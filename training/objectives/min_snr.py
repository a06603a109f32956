"""Min-SNR weighting (Hang et al. 2023): timesteps of little noise, whose error is small anyway, count less."""

from dataclasses import replace

import torch
from torch import Tensor

from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.training.objectives.objective import Batch, Draws, Objective


class MinSnr(Objective):
    """Weights every row by its timestep."""

    def __init__(self, schedule: NoiseSchedule, gamma: float) -> None:
        self._schedule, self._gamma = schedule, gamma

    def noised(self, batch: Batch, draws: Draws) -> Batch:
        """Multiply the weights."""
        return replace(batch, weights=batch.weights * snr_weights(self._schedule, batch.timesteps, self._gamma))


def snr_weights(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights [n] of timesteps [n] (section 3.4); ones for gamma 0."""
    if gamma == 0:
        return torch.ones(timesteps.shape)
    alpha_bar = schedule.alphas_cumprod[timesteps].float()
    ratio = alpha_bar / (1 - alpha_bar)
    scale = ratio if schedule.prediction_type == "epsilon" else ratio + 1
    return ratio.clamp(max=gamma) / scale
