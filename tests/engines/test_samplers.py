"""Every sampler equals diffusers' scheduler of the same configuration, step by step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.samplers import SamplerKind, make_table

# diffusers' DPM-Solver++ hands tensors to numpy in a way numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TOLERANCE = 1e-4
SHAPE = (2, 4, 8, 8)
SCHEDULERS: dict[SamplerKind, Any] = {
    SamplerKind.DDIM: DDIMScheduler,
    SamplerKind.EULER: EulerDiscreteScheduler,
    SamplerKind.DPMPP_2M: DPMSolverMultistepScheduler,
    SamplerKind.LCM: LCMScheduler,
}


def config_of(prediction: str, spacing: str, set_alpha_to_one: bool = False) -> dict[str, Any]:
    """A Stable Diffusion scheduler configuration."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "set_alpha_to_one": set_alpha_to_one,
        "steps_offset": 1 if spacing == "leading" else 0,
        "timestep_spacing": spacing,
    }


def build(kind: SamplerKind, config: dict[str, Any], steps: int) -> Any:
    """diffusers' scheduler, ready to step."""
    scheduler = SCHEDULERS[kind].from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 15, 20, 50])
@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("euler", 0), ("dpmpp_2m", 0), ("lcm", 0)])
def test_equals_diffusers(kind: SamplerKind, eta: float, steps: int, spacing: str, prediction: str) -> None:
    kind = SamplerKind(kind)
    config = config_of(prediction, spacing)
    scheduler = build(kind, config, steps)
    table = make_table(NoiseSchedule.from_config(config), kind, steps, eta)
    assert torch.equal(table.timesteps, scheduler.timesteps.float())
    # What diffusers keeps is `unscale` times our latents: Euler runs on x / sqrt(alpha_bar), the others on x itself.
    sigmas = scheduler.sigmas.double() if kind is SamplerKind.EULER else torch.zeros(steps + 1, dtype=torch.float64)
    unscale = torch.sqrt(1 + sigmas**2)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    assert table.init_scale == pytest.approx(float(scheduler.init_noise_sigma / unscale[0]), abs=1e-6)
    theirs, ours, prev = noise * scheduler.init_noise_sigma, noise * table.init_scale, torch.zeros(SHAPE)
    outputs = torch.Generator().manual_seed(6)
    fresh, twin = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for i, timestep in enumerate(scheduler.timesteps):
        close(ours, scheduler.scale_model_input(theirs, timestep), f"input of step {i}")
        out = torch.randn(SHAPE, generator=outputs)
        extra: dict[str, Any] = {"eta": eta} if kind is SamplerKind.DDIM else {}
        if kind is not SamplerKind.DPMPP_2M:
            extra["generator"] = fresh
        theirs = scheduler.step(out, timestep, theirs, return_dict=False, **extra)[0]
        added = torch.randn(SHAPE, generator=twin) if table.noisy[i] else torch.zeros(SHAPE)
        a, b, c, d, e, f = table.coefficients[i].unbind()
        ours, prev = a * ours + b * out + c * prev + d * added, e * ours + f * out
        close(ours * float(unscale[i + 1]), theirs, f"step {i}")
        # Go on from their latents, so that each step is compared by itself.
        ours = (theirs / unscale[i + 1]).float()


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Compare within the tolerance, in absolute terms (a first data estimate reaches 60)."""
    error = float((ours - theirs).abs().max())
    assert error <= TOLERANCE, f"{what}: error {error:.2e}"


@pytest.mark.parametrize("kind", list(SamplerKind))
def test_whole_run_equals_diffusers(kind: SamplerKind) -> None:
    """Without correction between the steps, on a model whose output depends on its input."""
    config = config_of("epsilon", "leading")
    scheduler = build(kind, config, 20)
    table = make_table(NoiseSchedule.from_config(config), kind, 20)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    theirs, ours, prev = noise * scheduler.init_noise_sigma, noise * table.init_scale, torch.zeros(SHAPE)
    fresh, twin = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(0.8 * x + timestep / 1000)

    for i, timestep in enumerate(scheduler.timesteps):
        out = model(scheduler.scale_model_input(theirs, timestep), timestep)
        extra: dict[str, Any] = {} if kind is SamplerKind.DPMPP_2M else {"generator": fresh}
        theirs = scheduler.step(out, timestep, theirs, return_dict=False, **extra)[0]
        mine = model(ours, table.timesteps[i])
        added = torch.randn(SHAPE, generator=twin) if table.noisy[i] else torch.zeros(SHAPE)
        a, b, c, d, e, f = table.coefficients[i].unbind()
        ours, prev = a * ours + b * mine + c * prev + d * added, e * ours + f * mine
    close(ours, theirs, "the result")


def test_data_estimate_inverts_the_noising(base_schedule: NoiseSchedule) -> None:
    """With the true noise as output, every step's data estimate is the clean latents."""
    clean, noise = torch.randn(2, *SHAPE[1:], generator=torch.Generator().manual_seed(3)).unbind()
    for prediction in ("epsilon", "v_prediction"):
        schedule = replace(base_schedule, prediction_type=prediction)
        for kind in SamplerKind:
            table = make_table(schedule, kind, 10)
            for i in range(10):
                alpha_bar = schedule.alphas_cumprod[int(table.timesteps[i])].float()
                x = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
                out = noise if prediction == "epsilon" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
                e, f = table.coefficients[i, 4:]
                assert torch.allclose(e * x + f * out, clean, atol=2e-5)


def test_set_alpha_to_one_counts() -> None:
    config = config_of("epsilon", "leading", set_alpha_to_one=True)
    table = make_table(NoiseSchedule.from_config(config), SamplerKind.DDIM, 4)
    assert torch.equal(table.coefficients[-1, :2], table.coefficients[-1, 4:])


@pytest.mark.parametrize(
    ("kind", "steps", "eta"), [("ddim", 0, 0), ("lcm", 51, 0), ("ddim", 5, 1.5), ("dpmpp_2m", 1000, 0)]
)
def test_refuses(base_schedule: NoiseSchedule, kind: str, steps: int, eta: float) -> None:
    with pytest.raises(InvalidArgument) as refused:
        make_table(base_schedule, SamplerKind(kind), steps, eta)
    assert refused.value.violations


def test_refuses_an_unknown_spacing(base_schedule: NoiseSchedule) -> None:
    with pytest.raises(InvalidArgument, match="karras"):
        make_table(replace(base_schedule, timestep_spacing="karras"), SamplerKind.EULER, 5)


@pytest.fixture
def base_schedule() -> NoiseSchedule:
    """The schedule of Stable Diffusion 1.x."""
    return NoiseSchedule.from_config(config_of("epsilon", "leading"))
