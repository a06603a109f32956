"""Schedules, accumulated gradients, plateaus: what an optimiser step is made of."""

import math

import pytest
import torch
from tiny_training import make_spec, make_task

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.loop import batch_loss, draw_batch, train_step
from hueshift.training.plateau import fixed_loss
from hueshift.training.spec import RateSchedule
from hueshift.training.state import rate_scale

Tiny = tuple[BaseModel, SpectralFactors]


def test_schedules_after_the_warm_up() -> None:
    def rates(schedule: RateSchedule, warmup: int) -> list[float]:
        return [rate_scale(step, warmup, 4, schedule) for step in range(4)]

    assert rates(RateSchedule.LINEAR, 2) == [0.5, 0.75, 0.5, 0.25]
    assert rates(RateSchedule.CONSTANT, 2) == [0.5, 1.0, 1.0, 1.0]
    cosine = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert rates(RateSchedule.COSINE, 0) == pytest.approx(cosine)
    assert rates(RateSchedule.COSINE, 2) == pytest.approx([0.5, *cosine[1:]])


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(tiny: Tiny) -> None:
    spec = make_spec(gradient_accumulation=3, precision="fp32")
    task, state = make_task(*tiny, spec)
    twin_task, twin = make_task(*tiny, spec)
    losses, sums = [], {name: torch.zeros_like(value) for name, value in twin.values.items()}
    for _ in range(3):
        loss = batch_loss(twin_task, twin.values, draw_batch(twin_task, twin))
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(twin.values.values()), allow_unused=True)
        for name, grad in zip(twin.values, grads, strict=True):
            sums[name] += torch.zeros(()) if grad is None else grad / 3
    seen = {}
    train_step(
        task, state, lambda _: seen.update({n: v.grad.clone() for n, v in state.values.items() if v.grad is not None})
    )
    assert state.arrived() == [pytest.approx(sum(losses) / 3)]
    assert state.step == 1
    for name, total in sums.items():
        assert torch.allclose(seen[name], total, atol=1e-5 * float(total.abs().max())), name


def test_a_plateau_is_as_many_checks_in_a_row_without_a_gain(tiny: Tiny) -> None:
    _, state = make_task(*tiny, make_spec(early_stop=2))
    for loss, stale in ((1.0, 0), (0.995, 1), (0.98, 0), (0.98, 1)):
        state.judge(loss, 0.01)
        assert int(state.plateau[1]) == stale
        assert not state.ended
    state.judge(0.975, 0.01)
    assert state.ended
    _, patient = make_task(*tiny, make_spec())
    patient.judge(1.0, 0.01)
    patient.judge(1.0, 0.01)
    assert not patient.ended


def test_the_fixed_loss_asks_the_same_questions_again_and_draws_nothing(tiny: Tiny) -> None:
    task, state = make_task(*tiny, make_spec(ema_decay=0.0))
    before = state.draws.generator.get_state()
    first = fixed_loss(task, state)
    assert fixed_loss(task, state) == first
    assert torch.equal(state.draws.generator.get_state(), before)
    with torch.no_grad():
        state.values["sigma"].add_(0.5)
    assert fixed_loss(task, state) != first
