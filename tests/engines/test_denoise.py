"""The loop's body: samples mix freely, and none notices its neighbours."""

import time
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from fake_engine import FakeEngine
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.interface import EngineRow, Plan
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.samplers import SamplerKind, make_table

SHAPE = (4, 6, 5)
SCHEDULE = NoiseSchedule.from_config({"steps_offset": 1, "set_alpha_to_one": False})


def context_of(seed: int, guided: bool) -> Tensor:
    """A context [2 or 1, 7, 3]."""
    return torch.randn(2 if guided else 1, 7, 3, generator=torch.Generator().manual_seed(seed))


def mixed_samples(slots: int = 3) -> list[Sample]:
    """Samples that differ in everything but their size."""
    kinds = [("ddim", 9, 0.0), ("ddim", 5, 0.8), ("euler", 7, 0), ("dpmpp_2m", 6, 0), ("lcm", 4, 0), ("dpmpp_2m", 1, 0)]
    samples = []
    for i, (kind, steps, eta) in enumerate(kinds):
        guidance = 1.0 if i % 3 == 1 else 2.0 + i
        samples.append(
            start_sample(
                100 + i,
                SHAPE,
                cross=CrossInputs((context_of(i, guidance > 1),)),
                guidance=guidance,
                table=make_table(SCHEDULE, SamplerKind(kind), steps, eta),
                slot=i % slots,
                needs_factored=i % slots == 2,
            )
        )
    return samples


def engine_with_rows() -> FakeEngine:
    """Slot 1 holds a low-rank mix, slot 2 a spectral one."""
    engine = FakeEngine(max_batch=16)
    engine.load_row(1, EngineRow(lowrank=torch.full((3,), 0.1)))
    engine.load_row(2, EngineRow(spectral=torch.full((3,), -0.2)))
    return engine


def run_alone(engine: FakeEngine, sample: Sample) -> Tensor:
    """All steps by itself."""
    while not sample.done:
        advance(engine, [sample])
    return sample.latents


def test_mixed_batches_equal_single_runs() -> None:
    engine = engine_with_rows()
    alone = [run_alone(engine, sample) for sample in mixed_samples()]
    together = mixed_samples()
    # They join at different steps and leave when done.
    active, waiting = together[:2], together[2:]
    while active:
        advance(engine, active)
        active = [sample for sample in active if not sample.done] + waiting[:1]
        del waiting[:1]
    for i, sample in enumerate(together):
        assert sample.done
        assert torch.allclose(sample.latents, alone[i], atol=1e-5), f"sample {i}"


def test_plan_follows_the_samples() -> None:
    engine = engine_with_rows()
    samples = mixed_samples()
    assert advance(engine, samples) is Plan.FACTORED
    assert engine.calls[-1] == (Plan.FACTORED, sum(sample.rows for sample in samples))
    assert advance(engine, [s for s in samples if not s.needs_factored and not s.done]) is Plan.DENSE
    assert advance(engine, samples[:1], Plan.FACTORED) is Plan.FACTORED


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_equals_a_plain_diffusers_loop(guidance: float) -> None:
    """The same seed gives the picture a Stable Diffusion pipeline would give, fresh noise of DDIM included."""
    engine = FakeEngine()
    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(11)
    context = context_of(3, True)
    x = torch.randn(1, *SHAPE, generator=generator)
    zero = torch.zeros(1, dtype=torch.int64)
    for timestep in scheduler.timesteps:
        negative, positive = (
            engine.denoise(Plan.DENSE, x, timestep.float().view(1), context[i : i + 1], zero) for i in (0, 1)
        )
        out = negative + guidance * (positive - negative)
        x = scheduler.step(out, timestep, x, eta=0.5, generator=generator, return_dict=False)[0]
    table = make_table(SCHEDULE, SamplerKind.DDIM, 8, 0.5)
    sample = start_sample(
        11, SHAPE, cross=CrossInputs((context if guidance > 1 else context[1:],)), guidance=guidance, table=table
    )
    assert torch.allclose(run_alone(engine, sample), x[0], atol=1e-4)


def test_a_poisoned_sample_harms_no_neighbour() -> None:
    engine = engine_with_rows()
    alone = [run_alone(engine, sample) for sample in mixed_samples()[:2]]
    samples = mixed_samples()[:3]
    samples[2].latents = torch.full(SHAPE, float("nan"))
    active = samples
    while active:
        advance(engine, active)
        active = [sample for sample in active if not sample.done]
    for sample, expected in zip(samples[:2], alone, strict=True):
        assert torch.allclose(sample.latents, expected, atol=1e-5)


def test_a_failing_engine_leaves_the_samples_as_they_were() -> None:
    def fail(plan: Plan, slots: Tensor) -> None:
        raise RuntimeError("no")

    sample = mixed_samples()[0]
    before = sample.latents.clone()
    with pytest.raises(RuntimeError):
        advance(FakeEngine(on_call=fail), [sample])
    assert sample.step == 0
    assert torch.equal(sample.latents, before)


class _FreeEngine(FakeEngine):
    """Costs next to nothing, so that what is measured is the loop."""

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        return latents


def test_the_loop_itself_costs_less_than_a_millisecond(base_model: BaseModel) -> None:
    """8 guided samples of the embedded model's shape, half of them with fresh noise; the best of several runs."""
    shape = (4, base_model.sample_size, base_model.sample_size)
    width, tokens = base_model.layout.token_width, base_model.max_tokens
    engine = _FreeEngine(max_batch=16)
    best = 1.0
    for _ in range(5):
        samples = [
            start_sample(
                i,
                shape,
                cross=CrossInputs((torch.randn(2, tokens, width),)),
                guidance=5.0,
                table=make_table(base_model.schedule, SamplerKind.LCM if i % 2 else SamplerKind.DPMPP_2M, 20),
            )
            for i in range(8)
        ]
        # This thread's own time: others on the machine must not count.
        begin = time.thread_time()
        for _ in range(20):
            advance(engine, samples)
        best = min(best, (time.thread_time() - begin) / 20)
    print(f"overhead of a step of 8 guided samples: {best * 1e3:.3f} ms")
    assert best < 1e-3
