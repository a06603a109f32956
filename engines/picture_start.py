"""Starting from a picture instead of from noise: img2img, and the inverted pictures of single-image editing."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.fused_update import UpdateForm
from hueshift.engines.interface import BASE_SLOT, UNetEngine
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.samplers import SamplerKind, SamplerTable, make_inverse_table, make_table, noise_levels
from hueshift.engines.transfer import to_device
from hueshift.engines.vae import VaeStage


def first_step(steps: int, strength: float) -> int:
    """Steps that a run of `steps` leaves out at `strength`: 1 changes everything, near 0 almost nothing.

    At least one step remains. Raises InvalidArgument outside of 0 < strength <= 1.
    """
    if not 0 < strength <= 1:
        raise InvalidArgument.for_field("strength", f"{strength} given; allowed: above 0, up to 1")
    return min(steps - 1, steps - math.ceil(steps * strength - 1e-9))


def noise_picture(clean: Tensor, seed: int, schedule: NoiseSchedule, table: SamplerTable) -> Tensor:
    """Noise latents [C, h, w] to the level of the table's first step, as img2img does (SDEdit, Meng et al. 2022)."""
    return noise_at(clean, seed, noise_levels(schedule, table))


def noise_at(clean: Tensor, seed: int, levels: tuple[float, float]) -> Tensor:
    """The same for `levels`, the shares of the picture and of noise."""
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    # By the step loop's thread, which must not wait for the steps that are queued.
    noised: Tensor = levels[0] * clean + levels[1] * to_device(drawn, clean.device)
    return noised


def mix_noise(inverted: Tensor, seed: int, share: float) -> Tensor:
    """Turn inverted latents [C, h, w] towards unit noise on the great circle: share 0 keeps them, 1 is the noise.

    SVDiff mixes so to let a structure change (Han et al. 2023, section 3.5; Shoemake 1985). The length goes over
    linearly, so that both ends are exact. Raises InvalidArgument outside of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InvalidArgument.for_field("noise_share", f"{share} given; allowed: 0 to 1")
    noise = to_device(torch.randn(inverted.shape, generator=torch.Generator().manual_seed(seed)), inverted.device)
    if share in (0, 1):
        return inverted if share == 0 else noise
    one, other = inverted.flatten().double(), noise.flatten().double()
    angle = torch.arccos(torch.clamp(one @ other / (one.norm() * other.norm()), -1, 1))
    direction = torch.sin((1 - share) * angle) * one / one.norm() + torch.sin(share * angle) * other / other.norm()
    length = (1 - share) * one.norm() + share * other.norm()
    mixed: Tensor = direction / torch.sin(angle) * length
    return mixed.view_as(inverted).to(inverted.dtype)


def mix_start(inverted: Tensor, clean: Tensor, seed: int, share: float, levels: tuple[float, float]) -> Tensor:
    """Latents [C, h, w] to sample from: inverted ones whose noise is turned towards the seed's by `share`.

    `levels` are the shares of the clean latents and of noise in the inverted ones (`noise_levels`). The picture's own
    share stays as it is, so that share 1 is what noise_picture gives at that level, whatever it is. At the full level,
    where hardly any of the picture is left, this is mix_noise. Raises what mix_noise raises.
    """
    if share == 0:
        return inverted
    signal, level = levels
    mixed: Tensor = signal * clean + level * mix_noise((inverted - signal * clean) / level, seed, share)
    return mixed


def encode_start(vae: VaeStage, picture: bytes, width: int, height: int) -> Tensor:
    """Latents [C, h, w], the mean of their distribution, of a PNG of ours fitted to width x height pixels.

    The picture is scaled until it just covers that size, and what stands over is cut off, half on either side.
    """
    with Image.open(io.BytesIO(picture), formats=("PNG",)) as opened:
        shown = opened.convert("RGB")
    fitted = ImageOps.fit(shown, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float().div_(127.5).sub_(1)
    return vae.moments(pixels[None])[0][0]


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Root mean square of the difference of two [...], over that of `wanted`: one number where they lie, unread."""
    return (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()


def start_inversion(
    clean: Tensor,
    schedule: NoiseSchedule,
    *,
    cross: CrossInputs,
    steps: int,
    begin: int = 0,
    slot: int = BASE_SLOT,
    needs_factored: bool = False,
) -> Sample:
    """A sample that runs latents [C, h, w] of a picture back to the noise level of step `begin`, without guidance.

    `cross` has one row, that of the target prompt. It steps like any other sample, in any batch.
    """
    table = make_inverse_table(schedule, steps, begin)
    shape = (clean.shape[0], clean.shape[1], clean.shape[2])
    sample = start_sample(0, shape, cross=cross, guidance=1.0, table=table, slot=slot, needs_factored=needs_factored)
    sample.latents = clean.clone()
    return sample


def inversion_error(
    engine: UNetEngine,
    clean: Sequence[Tensor],
    schedule: NoiseSchedule,
    *,
    cross: CrossInputs,
    steps: int,
    slot: int = BASE_SLOT,
    needs_factored: bool = False,
) -> float:
    """How far pictures come back after inversion and DDIM without guidance: root mean square over that of the latents.

    Arguments as in start_inversion.
    """
    samples = [
        start_inversion(latents, schedule, cross=cross, steps=steps, slot=slot, needs_factored=needs_factored)
        for latents in clean
    ]
    form = UpdateForm()
    for table in (samples[0].table, make_table(schedule, SamplerKind.DDIM, steps)):
        for sample in samples:
            sample.table, sample.step, sample.prev = table, 0, torch.zeros_like(sample.prev)
        for _ in range(table.steps):
            advance(engine, samples, form=form)
    return float(relative_error(torch.stack([sample.latents for sample in samples]), torch.stack(list(clean))))
