"""Latents to pixels and back."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel

Pixels = npt.NDArray[np.uint8]


class VaeStage:
    """The base's autoencoder. Latents are fp32 and scaled, as the UNet sees them. Safe to call from several threads."""

    def __init__(self, base: BaseModel) -> None:
        self._vae: Any = base.vae
        self._scale = float(base.vae.config.scaling_factor)
        parameter = next(base.vae.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Pixels:
        """Decode latents [n, 4, h, w] to uint8 pixels [n, H, W, 3]."""
        pixels = self._vae.decode(latents.to(self._device, self._dtype) / self._scale).sample
        bytes_ = pixels.float().mul_(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return np.ascontiguousarray(bytes_.permute(0, 2, 3, 1).cpu().numpy())

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n, 4, h, w] of the scaled latents of pixels [n, 3, H, W] fp32 in -1 to 1."""
        latents = self._vae.encode(pixels.to(self._device, self._dtype)).latent_dist
        return latents.mean.float() * self._scale, latents.std.float() * self._scale

    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw scaled latents [n, 4, h, w] of pixels [n, 3, H, W] fp32 in -1 to 1; `generator` lives on the CPU."""
        mean, deviation = self.moments(pixels)
        return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)
