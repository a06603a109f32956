"""The autoencoder's decoder in 16 bits and channels_last, with fused blocks: a picture takes a fraction of fp32's time.

SD1.5's decoder spends 2.5 TFLOP on a picture of 512 pixels, 25 steps with guidance about 40 in a format twice as fast
or more. Some decoders overflow fp16 on some pictures, so every result is looked at, and what is not finite is decoded
again in fp32 (vae.py). A decoder that does not draw what fp32's draws is not used at all.
"""

import copy
from typing import Any

import structlog
import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.cuda_layers import SlabRows
from hueshift.engines.device_errors import Fault, classify
from hueshift.engines.fused_blocks import fuse_blocks

# Largest mean difference from fp32's picture, over its mean where that is above 1. Half a level of 255 in -1..1: fp16
# makes 2e-4 on the embedded model, and one wrong activation 9e-3 at least.
MEAN_BOUND = 4e-3
_log = structlog.get_logger()


class HalfDecoder:
    """A copy of the decoder of `vae` in `dtype`. With `fuse` its blocks and norms run on the Triton kernels."""

    def __init__(self, vae: Any, dtype: torch.dtype, *, fuse: bool) -> None:
        self.dtype = dtype
        self._before: Any = None if vae.post_quant_conv is None else copy.deepcopy(vae.post_quant_conv).to(dtype)
        self._decoder: Any = copy.deepcopy(vae.decoder).to(dtype).to(memory_format=torch.channels_last)
        if fuse:
            # No norm of a decoder reads a slab.
            fuse_blocks(self._decoder, SlabRows({}, {}, torch.ones(1)))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents [n, 4, h, w], divided by their scale, to pixels [n, 3, H, W] in about -1..1, which may have
        overflowed."""
        given = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        pixels: Tensor = self._decoder(given if self._before is None else self._before(given))
        return pixels


def serving_decoder(base: BaseModel, *, fuse: bool) -> HalfDecoder | None:
    """The decoder in fp16 that a server draws with beside a GPU; None on a CPU, which is no faster in fp16."""
    if next(base.vae.parameters()).device.type != "cuda":
        return None
    return make_half_decoder(base, torch.float16, fuse=fuse)


def make_half_decoder(base: BaseModel, dtype: torch.dtype, *, fuse: bool) -> HalfDecoder | None:
    """The decoder of `base` in `dtype`, fused if asked and found right; None where fp32 has to stay.

    That is where the model's config asks for it (SDXL's `force_upcast`: its decoder gives black pictures in fp16) and
    where the copy draws something else, or nothing.
    """
    vae = base.vae
    if base.xl is not None and vae.config.get("force_upcast", True):
        return None
    parameter = next(vae.parameters())
    generator = torch.Generator().manual_seed(0)
    side = base.sample_size
    latents = torch.randn(1, base.latent_channels, side, side, generator=generator).to(parameter)
    with torch.no_grad():
        expected = vae.decode(latents).sample
    for fused in (True, False) if fuse else (False,):
        try:
            made = HalfDecoder(vae, dtype, fuse=fused)
            error = float((made(latents).float() - expected.float()).abs().mean() / expected.abs().mean().clamp_min(1))
        except Exception as fault:
            # Triton has errors of its own, for a kernel that it cannot compile or that this GPU does not take.
            if classify(fault) is not Fault.OTHER:
                raise
            _log.error("half_decoder_failed", fused=fused, exc_info=fault)
            continue
        if error <= MEAN_BOUND:
            _log.info("half_decoder", fused=fused, error=error)
            return made
        _log.error("half_decoder_wrong", fused=fused, error=error, bound=MEAN_BOUND)
    return None
