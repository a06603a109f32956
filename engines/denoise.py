"""The hot loop's body: one UNet call and one sampler update for samples that have nothing in common but their size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.engines.interface import BASE_SLOT, Plan, UNetEngine
from hueshift.engines.samplers import SamplerTable


@dataclass(slots=True, eq=False)
class Sample:
    """One picture being denoised.

    `latents` and `prev` (the last step's data estimate) are [C, h, w] fp32; `context` is [2, tokens, width], the
    negative prompt first, when `guidance` is above 1, else [1, tokens, width]. `step` counts the finished steps of
    `table`. `slot` is the engine slot of its adapter mix. `generator` lives on the CPU and gives the sample's own
    noise, so what it draws never depends on its neighbours.
    """

    latents: Tensor
    prev: Tensor
    context: Tensor
    guidance: float
    table: SamplerTable
    generator: torch.Generator
    slot: int = BASE_SLOT
    needs_factored: bool = False
    step: int = 0

    @property
    def guided(self) -> bool:
        """True if it runs with classifier-free guidance."""
        return self.guidance > 1

    @property
    def rows(self) -> int:
        """UNet rows it takes in a batch."""
        return 2 if self.guidance > 1 else 1

    @property
    def done(self) -> bool:
        """True once every step was taken."""
        return self.step >= self.table.steps


def start_sample(
    seed: int,
    shape: tuple[int, int, int],
    *,
    context: Tensor,
    guidance: float,
    table: SamplerTable,
    slot: int = BASE_SLOT,
    needs_factored: bool = False,
) -> Sample:
    """Draw the first latents of `shape` (C, h, w) from `seed`, on the CPU whatever the device, and place them."""
    generator = torch.Generator().manual_seed(seed)
    latents = (torch.randn(shape, generator=generator) * table.init_scale).to(context.device)
    return Sample(latents, torch.zeros_like(latents), context, guidance, table, generator, slot, needs_factored)


def choose_plan(engine: UNetEngine, samples: Sequence[Sample]) -> Plan:
    """The cheapest plan of the engine that can run all samples together."""
    if Plan.DENSE not in engine.plans or any(sample.needs_factored for sample in samples):
        return Plan.FACTORED
    return Plan.DENSE


@torch.inference_mode()
def advance(engine: UNetEngine, samples: Sequence[Sample], plan: Plan | None = None) -> Plan:
    """Take one step of every sample, in place; return the plan that ran.

    Samples may differ in everything but the shape of their latents: step, sampler, prompt, guidance, adapters. Guided
    samples are two UNet rows, eps = negative + guidance (prompt - negative) (Ho and Salimans 2022). What the engine
    raises passes through, and then no sample has changed (but for the noise it would draw next).
    """
    plan = plan or choose_plan(engine, samples)
    # Guided samples first, so that slices do: gathers over a batch cost more than all the rest of this function.
    samples = sorted(samples, key=_unguided)
    count, device = len(samples), samples[0].latents.device
    guided = [sample for sample in samples if sample.guided]
    rows = [*samples, *guided]
    latents = torch.stack([sample.latents for sample in rows])
    timesteps = torch.stack([sample.table.timesteps[sample.step] for sample in rows]).to(device)
    context = torch.stack([s.context[-1] for s in samples] + [s.context[0] for s in guided])
    slots = torch.tensor([sample.slot for sample in rows], device=device)
    out = engine.denoise(plan, latents, timesteps, context, slots)
    if guided:
        scale = torch.tensor([sample.guidance for sample in guided], device=device).view(-1, 1, 1, 1)
        negative = out[count:]
        toward = negative + scale * (out[: len(guided)] - negative)
        out = torch.cat([toward, out[len(guided) : count]]) if len(guided) < count else toward

    table = torch.stack([sample.table.coefficients[sample.step] for sample in samples]).to(device)
    a, b, c, d, e, f = table.t().reshape(6, count, 1, 1, 1).unbind()
    x, prev = latents[:count], torch.stack([sample.prev for sample in samples])
    after, estimate = a * x + b * out + c * prev, e * x + f * out
    if any(sample.table.noisy[sample.step] for sample in samples):
        after += d * torch.stack([_noise(sample) for sample in samples]).to(device)
    for i, sample in enumerate(samples):
        sample.latents, sample.prev = after[i], estimate[i]
        sample.step += 1
    return plan


def _unguided(sample: Sample) -> bool:
    return not sample.guided


def _noise(sample: Sample) -> Tensor:
    # Drawn only where the sampler asks for it, so a sample's stream of noise is that of a run alone.
    if sample.table.noisy[sample.step]:
        return torch.randn(sample.latents.shape, generator=sample.generator)
    return torch.zeros(sample.latents.shape)
