"""The objective against values computed by hand."""

from dataclasses import replace

import pytest
import torch

from hueshift.engines.base_model import BaseModel
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.training.objectives.denoising import ANCHOR_SHARE, denoising_loss, draw_timesteps
from hueshift.training.objectives.min_snr import snr_weights
from hueshift.training.objectives.objective import Batch


def small_schedule(prediction: str) -> NoiseSchedule:
    config = {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4], "prediction_type": prediction}
    return NoiseSchedule.from_config(config)


def test_the_loss_on_eps_is_the_weighted_squared_error() -> None:
    noise = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    batch = Batch(torch.zeros(2, 1, 2, 2), noise, torch.tensor([0, 3]), torch.tensor([0.5, 2.0]))
    target = small_schedule("epsilon").target(batch.clean, batch.noise, batch.timesteps)
    loss = denoising_loss(target, batch.weights, torch.zeros(2, 1, 2, 2))
    assert loss.item() == pytest.approx(0.5 * 1 + 2 * 4)


def test_the_loss_on_v_uses_the_velocity() -> None:
    # alpha_bar at step 1 is 0.9 * 0.8 = 0.72; v = sqrt(0.72) 2 - sqrt(0.28) 3.
    batch = Batch(torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0), torch.tensor([1]), torch.ones(1))
    target = small_schedule("v_prediction").target(batch.clean, batch.noise, batch.timesteps)
    loss = denoising_loss(target, batch.weights, torch.zeros(1, 1, 1, 1))
    assert loss.item() == pytest.approx((0.72**0.5 * 2 - 0.28**0.5 * 3) ** 2, rel=1e-5)


def test_min_snr_weights() -> None:
    schedule, steps = small_schedule("epsilon"), torch.arange(4)
    alpha_bar = schedule.alphas_cumprod
    ratio = alpha_bar / (1 - alpha_bar)
    assert snr_weights(schedule, steps, 0).tolist() == [1.0] * 4
    assert snr_weights(schedule, steps, 1.5).tolist() == pytest.approx([min(r, 1.5) / r for r in ratio.tolist()])
    v = replace(schedule, prediction_type="v_prediction")
    assert snr_weights(v, steps, 1.5).tolist() == pytest.approx([min(r, 1.5) / (r + 1) for r in ratio.tolist()])


def test_timesteps_come_one_from_each_stratum_dense_at_high_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_timesteps(4, 1000, 0, generator) for _ in range(500)])
    assert draws.min() >= 0
    assert draws.max() <= 999
    bounds = (1000 * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).sqrt()).tolist()
    ordered = draws.sort(dim=1).values
    for i in range(4):
        assert ordered[:, i].min() >= int(bounds[i])
        assert ordered[:, i].max() <= bounds[i + 1]
    # The mean of sqrt(u) is 2/3; strata must not be tied to places in the batch.
    assert draws.float().mean().item() == pytest.approx(1000 * 2 / 3, abs=10)
    assert draws[:, 0].float().mean().item() == pytest.approx(1000 * 2 / 3, abs=40)


def test_the_stated_share_of_timesteps_is_anchored_whatever_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, draws in ((1, 4000), (2, 2000), (4, 1000), (6, 600)):
        drawn = torch.cat([draw_timesteps(count, 1000, 250, generator) for _ in range(draws)]).float()
        low, high = drawn[drawn < 250], drawn[drawn >= 250]
        assert len(low) / len(drawn) == pytest.approx(ANCHOR_SHARE, abs=0.02)
        assert low.mean().item() == pytest.approx(125, abs=12)
        # Density 2t / (1000^2 - 250^2) above: the mean is 2/3 (1000^3 - 250^3) / (1000^2 - 250^2).
        assert high.mean().item() == pytest.approx(700, abs=12)


def test_one_timestep_of_the_base_schedule_is_in_range(base_model: BaseModel) -> None:
    drawn = draw_timesteps(1, base_model.schedule.train_steps, 250, torch.Generator().manual_seed(3))
    assert 0 <= int(drawn[0]) < base_model.schedule.train_steps
