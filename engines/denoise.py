"""The hot loop's body: one UNet call and one sampler update for samples that have nothing in common but their size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.fused_update import UpdateForm, fits
from hueshift.engines.interface import BASE_SLOT, Guides, Plan, UNetEngine, dense_in
from hueshift.engines.samplers import SamplerTable
from hueshift.engines.transfer import to_device


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A part of a picture with adapters and a prompt of its own: `mask` [h, w] fp32 from 0 to 1, at the latents' size.

    The masks of a picture's regions add up to at most 1 everywhere; what is missing is the picture's own.
    """

    mask: Tensor
    cross: CrossInputs
    slot: int = BASE_SLOT
    needs_factored: bool = False


@dataclass(slots=True, eq=False)
class Sample:
    """One picture being denoised.

    `latents` and `prev` (the last step's data estimate) are [C, h, w] fp32; `cross` has two rows, the negative prompt's
    first, when `guidance` is above 1, else one. `step` counts the finished steps of `table`. `slot` is the engine slot
    of its adapter mix. `generator` lives on the CPU and gives the sample's own noise, so what it draws never depends
    on its neighbours.

    `lag` [tokens] fp32 is 1 at the tokens that confine its low-rank branch (LAG sampling), and `lag_mask` [h, w] sums
    where that acted over the steps. `reference` is the picture whose self-attention it shares; both must be in every
    batch together, at the same step. `regions` are denoised beside the picture and blended by their masks at every
    step, as OMG does (Kong et al. 2024, section 3.3).
    """

    latents: Tensor
    prev: Tensor
    cross: CrossInputs
    guidance: float
    table: SamplerTable
    generator: torch.Generator
    slot: int = BASE_SLOT
    needs_factored: bool = False
    step: int = 0
    lag: Tensor | None = None
    lag_mask: Tensor | None = None
    reference: "Sample | None" = None
    regions: tuple[Region, ...] = ()

    @property
    def guided(self) -> bool:
        """True if it runs with classifier-free guidance."""
        return self.guidance > 1

    @property
    def rows(self) -> int:
        """UNet rows it takes in a batch."""
        return (2 if self.guidance > 1 else 1) * (1 + len(self.regions))

    @property
    def done(self) -> bool:
        """True once every step was taken."""
        return self.step >= self.table.steps

    @property
    def parts(self) -> "tuple[Sample | Region, ...]":
        """What is denoised for it: itself, then its regions."""
        return (self, *self.regions)


def start_sample(
    seed: int,
    shape: tuple[int, int, int],
    *,
    cross: CrossInputs,
    guidance: float,
    table: SamplerTable,
    slot: int = BASE_SLOT,
    needs_factored: bool = False,
    lag: Tensor | None = None,
    reference: Sample | None = None,
    regions: tuple[Region, ...] = (),
) -> Sample:
    """Draw the first latents of `shape` (C, h, w) from `seed`, on the CPU whatever the device, and place them."""
    generator = torch.Generator().manual_seed(seed)
    latents = to_device(torch.randn(shape, generator=generator) * table.init_scale, cross.device)
    prev = torch.zeros_like(latents)
    sample = Sample(latents, prev, cross, guidance, table, generator, slot, needs_factored)
    sample.lag, sample.reference, sample.regions = lag, reference, regions
    return sample


def choose_plan(engine: UNetEngine, samples: Sequence[Sample]) -> Plan:
    """The cheapest plan of the engine that can run all samples together.

    Those of a slot with dense deltas are together already (whole_rows.divide). Raises FailedPrecondition
    (PLAN_UNAVAILABLE) if a sample needs the full plan and the engine has none.
    """
    if samples[0].slot in dense_in(engine):
        return Plan.MERGED
    if any(sample.lag is not None or sample.reference is not None for sample in samples):
        if Plan.FULL not in engine.plans:
            raise FailedPrecondition(
                Reason.PLAN_UNAVAILABLE,
                f"the {engine.name} engine has no full plan, which LAG sampling and shared attention need; leave them "
                "out, or set engine.kind to torch or onnxruntime",
            )
        return Plan.FULL
    factored = any(part.needs_factored for sample in samples for part in sample.parts)
    return Plan.FACTORED if factored or Plan.DENSE not in engine.plans else Plan.DENSE


@torch.inference_mode()
def advance(
    engine: UNetEngine, samples: Sequence[Sample], plan: Plan | None = None, form: UpdateForm | None = None
) -> Plan:
    """Take one step of every sample, in place; return the plan that ran.

    Samples may differ in everything but the shape of their latents: step, sampler, prompt, guidance, adapters. Guided
    samples are two UNet rows, eps = negative + guidance (prompt - negative) (Ho and Salimans 2022). What the engine
    raises passes through, and then no sample has changed. `form` remembers between steps which form of the update runs.
    """
    form = form or UpdateForm()
    plan = plan or choose_plan(engine, samples)
    # Guided samples first, so that slices do: gathers over a batch cost more than all the rest of this function.
    samples = sorted(samples, key=_unguided)
    count, device = len(samples), samples[0].latents.device
    parts = [(sample, part) for sample in samples for part in sample.parts]
    with _unchanged_on_error(samples):
        out, masks = _unet_output(engine, samples, parts, plan)
        table = torch.stack([sample.table.coefficients[sample.step] for sample in samples])
        x, prev = torch.stack([sample.latents for sample in samples]), torch.stack([sample.prev for sample in samples])
        noise = None
        if any(sample.table.noisy[sample.step] for sample in samples):
            noise = to_device(torch.stack([_noise(sample) for sample in samples]), device)
        fused = None
        if fits(device) and len(parts) == count:
            scales = [sample.guidance for sample in samples if sample.guided]
            fused = form.update(x, prev, out, scales, table, noise)
        if fused is not None:
            after, estimate = fused
        else:
            out = _guide(samples, parts, out)
            a, b, c, d, e, f = to_device(table, device).t().reshape(6, count, 1, 1, 1).unbind()
            after, estimate = a * x + b * out + c * prev, e * x + f * out
            if noise is not None:
                after += d * noise
        shares = _add_masks(parts, masks)
    for i, sample in enumerate(samples):
        sample.latents, sample.prev = after[i], estimate[i]
        sample.lag_mask = shares.get(id(sample), sample.lag_mask)
        sample.step += 1
    return plan


@contextmanager
def _unchanged_on_error(samples: Sequence[Sample]) -> Iterator[None]:
    """Put the samples' random streams back where they were if a step fails: a retry must draw the same noise."""
    states = [(s.generator, s.generator.get_state()) for s in samples if s.table.noisy[s.step]]
    try:
        yield
    except BaseException:
        for generator, state in states:
            generator.set_state(state)
        raise


def _unet_output(
    engine: UNetEngine, samples: Sequence[Sample], parts: Sequence[tuple[Sample, Sample | Region]], plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """One UNet call: the rows of `parts`, then the negative rows of the guided ones among them, which come first.

    Also the masks of Plan.FULL by row, None under the others.
    """
    guided = sum(sample.guided for sample, _ in parts)
    rows = [*parts, *parts[:guided]]
    device = samples[0].latents.device
    latents = torch.stack([sample.latents for sample, _ in rows])
    timesteps = to_device(torch.stack([sample.table.timesteps[sample.step] for sample, _ in rows]), device)
    crosses = [part.cross.at(sample.step) for sample, part in parts]
    cross = torch.stack([rows[-1] for rows in crosses] + [rows[0] for rows in crosses[:guided]])
    added = _stack_added(parts, guided)
    # On the host: engines check it and look slots up there, and reading it back from a device would stall the stream.
    slots = torch.tensor([part.slot for _, part in rows])
    masks: Tensor | None = None
    if plan is Plan.FULL:
        guides = _make_guides(parts, guided, cross.shape[1])
        out, masks = engine.denoise_guided(latents, timesteps, cross, slots, guides, added)
    else:
        out = engine.denoise(plan, latents, timesteps, cross, slots, added)
    return out, masks


def _guide(samples: Sequence[Sample], parts: Sequence[tuple[Sample, Sample | Region]], out: Tensor) -> Tensor:
    """Guidance and the blending of regions: from rows of the UNet to the output for each sample [n, C, h, w]."""
    count, guided = len(parts), sum(sample.guided for sample, _ in parts)
    if guided:
        scale = to_device(torch.tensor([sample.guidance for sample, _ in parts[:guided]]), out.device).view(-1, 1, 1, 1)
        negative = out[count:]
        toward = negative + scale * (out[:guided] - negative)
        out = torch.cat([toward, out[guided:count]]) if guided < count else toward
    return out if count == len(samples) else _blend_regions(samples, out)


def _stack_added(parts: Sequence[tuple[Sample, Sample | Region]], guided: int) -> Tensor | None:
    """SDXL's added embeddings [N, width], rows as those of `cross`."""
    each = [part.cross.added_at(sample.step) for sample, part in parts]
    present = [rows for rows in each if rows is not None]
    if not present:
        return None
    return torch.stack([rows[-1] for rows in present] + [rows[0] for rows in present[:guided]])


def _make_guides(parts: Sequence[tuple[Sample, Sample | Region]], guided: int, tokens: int) -> Guides:
    """Guides of the rows of `parts`, and of the negative rows of the first `guided` of them behind those."""
    count, device = len(parts), parts[0][0].latents.device
    none = torch.zeros(tokens, device=device)
    confined = [sample.lag if part is sample and sample.lag is not None else none for sample, part in parts]
    first = {id(sample): number for number, (sample, part) in reversed(list(enumerate(parts))) if part is sample}
    own = list(range(count))
    shared = [
        # A region shares with the same region of the reference.
        number if sample.reference is None else first[id(sample.reference)] + number - first[id(sample)]
        for number, (sample, _) in enumerate(parts)
    ]
    return Guides(
        lag=torch.stack([*confined, *[none] * guided]),
        lag_source=to_device(torch.tensor(own + own[:guided]), device),
        reference=to_device(torch.tensor(shared + [count + number for number in shared[:guided]]), device),
    )


def _add_masks(parts: Sequence[tuple[Sample, Sample | Region]], masks: Tensor | None) -> dict[int, Tensor]:
    """The new `lag_mask` of every sample that is confined, by id."""
    if masks is None:
        return {}
    return {
        id(sample): masks[number] if sample.lag_mask is None else sample.lag_mask + masks[number]
        for number, (sample, part) in enumerate(parts)
        if part is sample and sample.lag is not None
    }


def _blend_regions(samples: Sequence[Sample], out: Tensor) -> Tensor:
    """Outputs of parts to outputs of samples: each region's where its mask is, the picture's own elsewhere."""
    blended: list[Tensor] = []
    number = 0
    for sample in samples:
        total = out[number]
        for offset, region in enumerate(sample.regions, 1):
            # Written as a change of the picture's own output, so that a mask of zeros leaves its bits alone.
            total = total + region.mask * (out[number + offset] - out[number])
        blended.append(total)
        number += len(sample.parts)
    return torch.stack(blended)


def _unguided(sample: Sample) -> bool:
    return not sample.guided


def _noise(sample: Sample) -> Tensor:
    # Drawn only where the sampler asks for it, so a sample's stream of noise is that of a run alone.
    if sample.table.noisy[sample.step]:
        return torch.randn(sample.latents.shape, generator=sample.generator)
    return torch.zeros(sample.latents.shape)
