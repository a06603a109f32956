"""Latents to pixels and back."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.cuda_lane import GraphLane, make_beside
from hueshift.engines.half_decoder import HalfDecoder

Pixels = npt.NDArray[np.uint8]


# Pixels decoded in one call: the decoder's widest layers take about 2 KB for each in fp32.
_MOST_PIXELS = 2**22
_log = structlog.get_logger()


class VaeStage:
    """The base's autoencoder. Latents are fp32 and scaled, as the UNet sees them. Safe to call from several threads.

    Pictures with a side above `tile_above` pixels (0: none) are decoded in overlapping tiles of at most half of that a
    side, one by one, and blended: memory stays that of a tile, and colours may differ by a few levels, because the
    decoder's norms see a tile at a time.

    With a `half` decoder pictures are decoded by it, and in the base's own dtype again where it overflowed.

    With a `lane` pictures are encoded there, beside denoising steps, and handed over finished. Decoding runs on the
    caller's stream, who takes the pixels to the host anyway.
    """

    def __init__(
        self, base: BaseModel, *, tile_above: int = 0, lane: GraphLane | None = None, half: HalfDecoder | None = None
    ) -> None:
        self._vae: Any = base.vae
        self._lane = lane
        self._half = half
        self._factor = base.latent_factor
        self._tile_above = tile_above
        self._scale = float(base.vae.config.scaling_factor)
        parameter = next(base.vae.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Pixels:
        """Decode latents [n, 4, h, w] to uint8 pixels [n, H, W, 3]."""
        height, width = (side * self._factor for side in latents.shape[2:])
        count = max(1, _MOST_PIXELS // (height * width))
        tiled = 0 < self._tile_above < max(height, width)
        if tiled:
            parts = [_to_bytes(self._decode_tiled(picture[None])) for picture in latents]
        else:
            parts = [_to_bytes(self._decode(part)) for part in torch.split(latents, count)]
        return np.ascontiguousarray(np.concatenate(parts))

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self._device, self._dtype) / self._scale
        if self._half is not None:
            pixels = self._half(scaled).float()
            if bool(torch.isfinite(pixels).all()):
                return pixels
            _log.warning("decoder_overflow", pictures=latents.shape[0], again_in=str(self._dtype))
        own: Tensor = self._vae.decode(scaled).sample
        return own.float()

    def _decode_tiled(self, latents: Tensor) -> Tensor:
        """Mean of the tiles over each pixel, weighted by ramps that fall towards a tile's edges."""
        factor, side = self._factor, max(2, self._tile_above // 2 // self._factor)
        height, width = latents.shape[2:]
        ramp = max(1, side // 4) * factor
        total = torch.zeros(1, 3, height * factor, width * factor, device=self._device)
        weight = torch.zeros(1, 1, height * factor, width * factor, device=self._device)
        for top in tile_starts(height, side):
            for left in tile_starts(width, side):
                tile = self._decode(latents[:, :, top : top + side, left : left + side])
                share = _ramps(tile.shape[2], ramp)[:, None] * _ramps(tile.shape[3], ramp)
                share = share.to(self._device)
                area = (..., slice(top * factor, (top + side) * factor), slice(left * factor, (left + side) * factor))
                total[area] += tile * share
                weight[area] += share
        return total / weight

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n, 4, h, w] of the scaled latents of pixels [n, 3, H, W] fp32 in -1 to 1."""
        if self._lane is None:
            return self._moments(pixels)
        return make_beside(self._lane, partial(self._moments, pixels), lambda made: made)

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = self._vae.encode(pixels.to(self._device, self._dtype)).latent_dist
        return latents.mean.float() * self._scale, latents.std.float() * self._scale

    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw scaled latents [n, 4, h, w] of pixels [n, 3, H, W] fp32 in -1 to 1; `generator` lives on the CPU."""
        mean, deviation = self.moments(pixels)
        return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)


def tile_starts(length: int, side: int) -> list[int]:
    """Where tiles of `side` begin so that they cover `length`, each overlapping the next by at least a quarter."""
    if length <= side:
        return [0]
    count = -(-(length - side) // max(1, side - side // 4)) + 1
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def _ramps(size: int, ramp: int) -> Tensor:
    """Weights [size] that rise over `ramp` pixels from both edges; never 0, so the picture's own edges count too."""
    place = torch.arange(size, dtype=torch.float32) + 0.5
    return torch.minimum(place, size - place).clamp(max=ramp) / ramp


def _to_bytes(pixels: Tensor) -> Pixels:
    bytes_ = pixels.mul_(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    array: Pixels = bytes_.permute(0, 2, 3, 1).cpu().numpy()
    return array
