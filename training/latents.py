"""Training pictures as latents: encoded once, drawn anew at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hueshift.engines.vae import VaeStage
from hueshift.training.pictures import picture_tensor

# Encoding needs about 70 times the memory of the latents; a few pictures at once keep 512-pixel jobs under a gigabyte.
_ENCODE_BATCH = 4


@dataclass(frozen=True, slots=True, eq=False)
class PictureLatents:
    """Mean and standard deviation [n, 4, h, w] of the scaled latents of n pictures, fp32 on the CPU."""

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return self.mean.shape[0]

    def draw(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents [m, 4, h, w] of the pictures at `indices` [m] from the encoder's posterior."""
        mean = self.mean[indices]
        return mean + self.std[indices] * torch.randn(mean.shape, generator=generator)


def encode_pictures(
    vae: VaeStage, pictures: Sequence[Image.Image], size: int, *, mirror: bool = False
) -> PictureLatents:
    """Encode pictures at `size` x `size` pixels; with `mirror` their mirror images follow, in the same order."""
    pixels = torch.stack([picture_tensor(picture, size) for picture in pictures])
    if mirror:
        pixels = torch.cat([pixels, pixels.flip(-1)])
    parts = [vae.moments(part) for part in torch.split(pixels, _ENCODE_BATCH)]
    mean, std = (torch.cat([part[i] for part in parts]).cpu() for i in (0, 1))
    return PictureLatents(mean, std)
