"""The fused update gives what the step does without it, and a step that fails leaves its samples as they were."""

from collections.abc import Callable

import pytest
import torch
from fake_engine import FakeEngine
from structlog.testing import capture_logs
from torch import Tensor

from hueshift.engines import denoise, fused_update
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.fused_update import UpdateForm
from hueshift.engines.interface import Plan
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.samplers import SamplerKind, make_table

SCHEDULE = NoiseSchedule.from_config({"steps_offset": 1, "set_alpha_to_one": False})
KINDS = ((SamplerKind.DDIM, 1.0), (SamplerKind.EULER, 0.0), (SamplerKind.DPMPP_2M, 0.0), (SamplerKind.LCM, 0.0))


def make_samples() -> list[Sample]:
    """Guided and unguided ones of every sampler, two of which draw noise."""
    samples = []
    for number, (kind, eta) in enumerate(KINDS):
        guidance = 5.0 if number % 2 else 1.0
        cross = torch.randn(2 if guidance > 1 else 1, 3, 4, generator=torch.Generator().manual_seed(number))
        table = make_table(SCHEDULE, kind, 5, eta)
        samples.append(start_sample(number, (4, 8, 8), cross=CrossInputs((cross,)), guidance=guidance, table=table))
    return samples


def test_the_fused_update_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = make_samples(), make_samples()
    engine = FakeEngine()
    for _ in range(5):
        advance(engine, plain)
    monkeypatch.setattr(denoise, "fits", lambda device: True)
    for _ in range(5):
        advance(engine, fused)
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(other.latents, one.latents, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.prev, one.prev, rtol=1e-5, atol=1e-6)


class OutOfResourcesError(Exception):
    """As Triton's, which is no RuntimeError."""


def test_a_kernel_that_fails_is_asked_once_and_torch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, served = make_samples(), make_samples()
    engine, form, asked = FakeEngine(), UpdateForm(), []
    for _ in range(5):
        advance(engine, plain)

    def refuse(*_: object) -> None:
        asked.append(1)
        raise OutOfResourcesError("out of resource: threads")

    monkeypatch.setattr(denoise, "fits", lambda device: True)
    monkeypatch.setattr(fused_update, "sampler_step", refuse)
    with capture_logs() as logs:
        for _ in range(5):
            advance(engine, served, form=form)
    assert [(log["event"], log["log_level"]) for log in logs] == [("sampler_step_failed", "error")]
    assert asked == [1]
    for one, other in zip(plain, served, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.prev, other.prev)


@pytest.mark.parametrize(
    "fault", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_a_device_that_is_lost_or_full_is_told(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def refuse(*_: object) -> None:
        raise fault

    monkeypatch.setattr(denoise, "fits", lambda device: True)
    monkeypatch.setattr(fused_update, "sampler_step", refuse)
    samples, form = make_samples(), UpdateForm()
    for _ in range(2):
        with pytest.raises(type(fault)):
            advance(FakeEngine(), samples, form=form)
    assert [sample.step for sample in samples] == [0] * len(samples)


def failing_after(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the part of a step behind the noise fail once."""
    add: Callable[..., dict[int, Tensor]] = denoise._add_masks

    def fail(*_: object) -> dict[int, Tensor]:
        monkeypatch.setattr(denoise, "_add_masks", add)
        raise MemoryError

    monkeypatch.setattr(denoise, "_add_masks", fail)


def test_a_failed_step_draws_the_same_noise_when_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, expected, retried = FakeEngine(), make_samples(), make_samples()
    advance(engine, expected)
    failing_after(engine, monkeypatch)
    before = [sample.latents.clone() for sample in retried]
    with pytest.raises(MemoryError):
        advance(engine, retried)
    assert [sample.step for sample in retried] == [0] * len(retried)
    assert all(torch.equal(sample.latents, latents) for sample, latents in zip(retried, before, strict=True))
    assert advance(engine, retried) is Plan.DENSE
    for one, other in zip(expected, retried, strict=True):
        assert torch.equal(one.latents, other.latents)
