"""Starting from a picture: img2img's noise, inversion and its way back, and the mixing of noise."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_engine import FakeEngine
from fake_gpu import GPU, fake_gpu
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import EngineOptions, build_engine
from hueshift.engines.conditioning import CrossInputs, make_conditioner
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.interface import Plan
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.picture_start import (
    first_step,
    inversion_error,
    mix_noise,
    mix_start,
    noise_at,
    noise_picture,
    start_inversion,
)
from hueshift.engines.samplers import SamplerKind, make_inverse_table, make_path_tables, make_table, noise_levels
from hueshift.engines.text_side import TextSide

SHAPE = (4, 8, 8)


def schedule_of(prediction: str = "epsilon") -> NoiseSchedule:
    """That of Stable Diffusion."""
    return NoiseSchedule.from_config({"prediction_type": prediction, "steps_offset": 1, "set_alpha_to_one": False})


def drawn(seed: int) -> Tensor:
    """Latents."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("steps", "strength", "expected"), [(20, 1.0, 0), (20, 0.5, 10), (20, 0.05, 19), (20, 0.001, 19), (3, 0.34, 1)]
)
def test_strength_is_the_share_of_steps_that_run(steps: int, strength: float, expected: int) -> None:
    assert first_step(steps, strength) == expected


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan])
def test_other_strengths_are_refused(strength: float) -> None:
    with pytest.raises(InvalidArgument, match="strength"):
        first_step(20, strength)


@pytest.mark.parametrize("kind", [SamplerKind.DDIM, SamplerKind.EULER, SamplerKind.DPMPP_2M, SamplerKind.LCM])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_later_beginning_is_the_same_run_from_there(kind: SamplerKind, prediction: str) -> None:
    schedule = schedule_of(prediction)
    whole, tail = make_table(schedule, kind, 10), make_table(schedule, kind, 10, begin=4)
    assert torch.equal(tail.timesteps, whole.timesteps[4:])
    assert torch.equal(tail.coefficients[1:], whole.coefficients[5:])
    assert tail.coefficients[0, 2] == 0
    # With the true clean picture as every estimate the step lands where the whole table's does.
    clean, noise = drawn(1).double(), drawn(2).double()
    signal, level = noise_levels(schedule, tail)
    x = signal * clean + level * noise
    out = noise if prediction == "epsilon" else signal * noise - level * clean
    one, other = (row[0] * x + row[1] * out + row[2] * clean for row in (tail.coefficients[0], whole.coefficients[4]))
    assert torch.allclose(one, other, atol=1e-4)


def test_noise_levels_are_those_of_the_schedule() -> None:
    schedule = schedule_of()
    table = make_table(schedule, SamplerKind.DDIM, 20, begin=7)
    alpha_bar = float(schedule.alphas_cumprod[int(table.timesteps[0])])
    assert noise_levels(schedule, table) == pytest.approx((alpha_bar**0.5, (1 - alpha_bar) ** 0.5), rel=1e-6)
    noised = noise_picture(drawn(1), 3, schedule, table)
    assert torch.allclose(noised, alpha_bar**0.5 * drawn(1) + (1 - alpha_bar) ** 0.5 * drawn(3), atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("begin", [0, 6])
def test_inverse_steps_undo_ddim_where_the_output_is_the_same(prediction: str, begin: int) -> None:
    schedule = schedule_of(prediction)
    forward, back = make_table(schedule, SamplerKind.DDIM, 12, begin=begin), make_inverse_table(schedule, 12, begin)
    assert torch.equal(back.timesteps, forward.timesteps.flip(0))
    x = drawn(0).double()
    visited, estimates, outs = [x], [], [drawn(10 + i).double() for i in range(forward.steps)]
    for row, out in zip(forward.coefficients.double(), outs, strict=True):
        estimates.append(row[4] * visited[-1] + row[5] * out)
        visited.append(row[0] * visited[-1] + row[1] * out)
    x = visited[-1]
    for i, (row, out) in enumerate(zip(back.coefficients.double(), reversed(outs), strict=True), 2):
        assert torch.allclose(row[4] * x + row[5] * out, estimates[-i + 1], atol=2e-3)
        x = row[0] * x + row[1] * out
        assert torch.allclose(x, visited[-i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("begin", [0, 6])
def test_a_path_to_ddims_own_level_is_its_inverse(prediction: str, begin: int) -> None:
    schedule = schedule_of(prediction)
    forward, inverse = make_table(schedule, SamplerKind.DDIM, 12, begin=begin), make_inverse_table(schedule, 12, begin)
    up, down = make_path_tables(schedule, 12, float(forward.timesteps[0]))
    for one, other in ((up, inverse), (down, forward)):
        assert torch.equal(one.timesteps, other.timesteps)
        assert torch.allclose(one.coefficients, other.coefficients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(SamplerKind))
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_path_ends_where_any_sampler_begins(kind: SamplerKind, spacing: str) -> None:
    """True noise, carried up from the clean picture, lands on the level the sampler expects, in 20 steps at most."""
    schedule = replace(schedule_of(), timestep_spacing=spacing)
    clean, noise = drawn(1).double(), drawn(2).double()
    for steps, begin in ((4, 0), (10, 3), (30, 29), (50, 0)):
        table = make_table(schedule, kind, steps, begin=begin)
        up, down = make_path_tables(schedule, 20, float(table.timesteps[0]))
        assert up.steps == down.steps <= 20
        assert torch.equal(up.timesteps, down.timesteps.flip(0))
        assert bool((up.timesteps.diff() > 0).all())
        low = float(schedule.alphas_cumprod[0])
        x = low**0.5 * clean + (1 - low) ** 0.5 * noise
        for row in up.coefficients.double():
            x = row[0] * x + row[1] * noise
        signal, level = noise_levels(schedule, table)
        assert torch.allclose(x, signal * clean + level * noise, atol=1e-4)
        for row in down.coefficients.double():
            assert torch.allclose(row[4] * x + row[5] * noise, clean, atol=1e-3)
            x = row[0] * x + row[1] * noise
        assert torch.allclose(x, low**0.5 * clean + (1 - low) ** 0.5 * noise, atol=1e-4)


def test_mixing_keeps_both_ends_exactly_and_the_length_between() -> None:
    kept, noise = drawn(1), torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    assert torch.equal(mix_noise(kept, 9, 0), kept)
    assert torch.equal(mix_noise(kept, 9, 1), noise)
    half = mix_noise(kept, 9, 0.5)
    assert float(half.norm()) == pytest.approx(float((kept.norm() + noise.norm()) / 2), rel=1e-5)
    # On the plane of the two, at equal angles to both.
    cosines = [float(half.flatten() @ end.flatten() / (half.norm() * end.norm())) for end in (kept, noise)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-5)
    with pytest.raises(InvalidArgument, match="noise_share"):
        mix_noise(kept, 9, 1.5)


def test_no_start_waits_for_the_device() -> None:
    with fake_gpu() as gpu:
        clean = torch.zeros(SHAPE, device=GPU)
        assert noise_at(clean, 1, (0.6, 0.8)).device == GPU
        for share in (0.0, 0.4, 1.0):
            assert mix_start(clean, clean, 1, share, (0.6, 0.8)).device == GPU
        assert gpu.waits == []


def test_inversion_joins_a_mixed_batch() -> None:
    schedule, engine = schedule_of(), FakeEngine(max_batch=8)
    cross = CrossInputs((torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(2)),))

    def samples() -> list[Sample]:
        return [start_inversion(drawn(i), schedule, cross=cross, steps=6, begin=i) for i in (0, 2)]

    alone, together = samples(), samples()
    for sample in alone:
        while not sample.done:
            advance(engine, [sample])
    while active := [sample for sample in together if not sample.done]:
        assert advance(engine, active) is Plan.DENSE
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-6)


def test_a_real_picture_comes_back(base_model: BaseModel, cache_dir: Path) -> None:
    """The error falls with the number of steps, as the approximation out(x', t) = out(x, t) gets better."""
    engine = build_engine(base_model, EngineOptions(cache_dir=cache_dir))
    text = make_conditioner(base_model, engine.factors)
    cross = text.condition(["an emoji of a red apple"], TextSide(), [0.0]).cross
    cross2 = text.condition(["", "an emoji of a red apple"], TextSide(), [0.0]).cross
    picture = start_sample(
        1, (4, 32, 32), cross=cross2, guidance=3.0, table=make_table(base_model.schedule, SamplerKind.DPMPP_2M, 12)
    )
    while not picture.done:
        advance(engine, [picture])
    errors = [
        inversion_error(engine, [picture.latents], base_model.schedule, cross=cross, steps=steps) for steps in (5, 20)
    ]
    print(f"round trip of inversion: {errors[0]:.3f} at 5 steps, {errors[1]:.3f} at 20")
    assert errors[1] < errors[0]
    assert errors[1] < 0.2
