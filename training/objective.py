"""What training minimises: the denoising error of the pictures, and of class pictures that keep what it knew."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.engines.noise_schedule import NoiseSchedule

# Share of rows that hold the base's fine detail.
ANCHOR_SHARE = 0.125


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one step: `clean` latents and `noise` [n, 4, h, w], `timesteps` [n] int64, `weights` [n].

    `weights` are the rows' shares of the loss: 1/instances for pictures, prior_weight/class pictures for those.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor


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


def denoising_loss(target: Tensor, weights: Tensor, output: Tensor) -> Tensor:
    """Mean squared error of the model's `output` [n, 4, h, w] against `target`, weighted by row, as a scalar."""
    return ((output.float() - target).square().mean(dim=(1, 2, 3)) * weights).sum()
