"""What training minimises: the denoising error of the pictures, and of class pictures that keep what it knew."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.engines.noise_schedule import NoiseSchedule


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one step: `clean` latents and `noise` [n, 4, h, w], `timesteps` [n] int64, `weights` [n].

    `weights` are the rows' shares of the loss: 1/instances for pictures, prior_weight/class pictures for those.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor


def draw_timesteps(count: int, train_steps: int, generator: torch.Generator) -> Tensor:
    """Draw `count` timesteps, one from each of `count` equally likely strata, dense where noise is high.

    t = floor(T sqrt(u)): the density grows with t. What a thing is gets decided at high noise, and a short run has no
    steps to spare for the fine texture that the base knows already. Strata cut the variance of the loss of a batch of
    four by more than half.
    """
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (train_steps * strata.sqrt()).long().clamp(max=train_steps - 1)
    return timesteps[torch.randperm(count, generator=generator)]


def row_weights(instances: int, class_rows: int, prior_weight: float) -> Tensor:
    """Weights [instances + class_rows] that sum to L_instance + prior_weight L_prior (Ruiz et al. 2023, equation 2)."""
    return torch.cat(
        [torch.full((instances,), 1 / instances), torch.full((class_rows,), prior_weight / max(1, class_rows))]
    )


def snr_weights(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights [n] of timesteps [n] (Hang et al. 2023, section 3.4); ones for gamma 0."""
    if gamma == 0:
        return torch.ones(timesteps.shape)
    alpha_bar = schedule.alphas_cumprod[timesteps].float()
    ratio = alpha_bar / (1 - alpha_bar)
    scale = ratio if schedule.prediction_type == "epsilon" else ratio + 1
    return ratio.clamp(max=gamma) / scale


def denoising_loss(schedule: NoiseSchedule, batch: Batch, output: Tensor) -> Tensor:
    """Weighted mean squared error of the model's `output` [n, 4, h, w] against eps or v, as a scalar."""
    target = schedule.target(batch.clean, batch.noise, batch.timesteps)
    errors = (output.float() - target).square().mean(dim=(1, 2, 3))
    return (errors * batch.weights).sum()
