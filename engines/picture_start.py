"""Starting from a picture instead of from noise: img2img, and the inverted pictures of single-image editing."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.interface import BASE_SLOT, UNetEngine
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.samplers import SamplerKind, SamplerTable, make_inverse_table, make_table, noise_levels


def first_step(steps: int, strength: float) -> int:
    """Steps that a run of `steps` leaves out at `strength`: 1 changes everything, near 0 almost nothing.

    At least one step remains. Raises InvalidArgument outside of 0 < strength <= 1.
    """
    if not 0 < strength <= 1:
        raise InvalidArgument.for_field("strength", f"{strength} given; allowed: above 0, up to 1")
    return min(steps - 1, steps - math.ceil(steps * strength - 1e-9))


def noise_picture(clean: Tensor, seed: int, schedule: NoiseSchedule, table: SamplerTable) -> Tensor:
    """Noise latents [C, h, w] to the level of the table's first step, as img2img does (SDEdit, Meng et al. 2022)."""
    signal, noise = noise_levels(schedule, table)
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noised: Tensor = signal * clean + noise * drawn.to(clean.device)
    return noised


def mix_noise(inverted: Tensor, seed: int, share: float) -> Tensor:
    """Turn inverted latents [C, h, w] towards unit noise on the great circle: share 0 keeps them, 1 is the noise.

    SVDiff mixes so to let a structure change (Han et al. 2023, section 3.5; Shoemake 1985). The length goes over
    linearly, so that both ends are exact. Raises InvalidArgument outside of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InvalidArgument.for_field("noise_share", f"{share} given; allowed: 0 to 1")
    noise = torch.randn(inverted.shape, generator=torch.Generator().manual_seed(seed)).to(inverted.device)
    if share in (0, 1):
        return inverted if share == 0 else noise
    one, other = inverted.flatten().double(), noise.flatten().double()
    angle = torch.arccos(torch.clamp(one @ other / (one.norm() * other.norm()), -1, 1))
    direction = torch.sin((1 - share) * angle) * one / one.norm() + torch.sin(share * angle) * other / other.norm()
    length = (1 - share) * one.norm() + share * other.norm()
    mixed: Tensor = direction / torch.sin(angle) * length
    return mixed.view_as(inverted).to(inverted.dtype)


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
    for table in (samples[0].table, make_table(schedule, SamplerKind.DDIM, steps)):
        for sample in samples:
            sample.table, sample.step, sample.prev = table, 0, torch.zeros_like(sample.prev)
        for _ in range(table.steps):
            advance(engine, samples)
    found, wanted = torch.stack([sample.latents for sample in samples]), torch.stack(list(clean))
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
