"""A shared pass of the UNet: each job's loss and gradients are its own, and nothing of the others'."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_training import make_pair_spec, make_spec, make_task
from torch import Tensor

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.training.loop import TrainingTask, draw_batch, make_work
from hueshift.training.objectives.objective import Batch
from hueshift.training.sharing.captured import CapturedSteps
from hueshift.training.sharing.together import Share, SharedStep, step_together
from hueshift.training.spec import Method, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import work_loss

Tiny = tuple[BaseModel, SpectralFactors]
Job = tuple[TrainingTask, TrainingState]
FP32: dict[str, Any] = {"precision": "fp32", "caption_dropout": 0.0}


def make_jobs(tiny: Tiny, specs: Sequence[TrainingSpec]) -> list[Job]:
    """Jobs on one UNet, each with values and draws of its own."""
    jobs: list[Job] = []
    for number, spec in enumerate(specs):
        task, state = make_task(*tiny, spec)
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for value in state.values.values():
                value += 0.05 * torch.randn(value.shape, generator=generator)
        state.draws.generator.manual_seed(200 + number)
        jobs.append((replace(task, unet=jobs[0][0].unet) if jobs else task, state))
    return jobs


def draw(jobs: Sequence[Job]) -> list[Batch]:
    """One batch of each job."""
    return [draw_batch(*job) for job in jobs]


def make_shares(jobs: Sequence[Job], batches: Sequence[Batch] | None = None) -> list[Share]:
    """What each job brings to a step."""
    return [
        Share(make_work(task, state.values, batch), state, task.spec.gradient_accumulation)
        for (task, state), batch in zip(jobs, batches or draw(jobs), strict=True)
    ]


def alone(job: Job, share: Share) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a job by itself."""
    task, state = job
    loss = work_loss(task.unet, share.work)
    grads = torch.autograd.grad(loss / share.count, list(state.values.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(state.values, grads, strict=True) if g is not None}


def text_of(tiny: Tiny) -> TextStage:
    """The text encoder of all jobs."""
    return TextStage(tiny[0])


def spread(job: Job, loss: Tensor | Exception) -> dict[str, Tensor]:
    """The gradients that a step left at the job's values."""
    assert isinstance(loss, Tensor)
    return {name: value.grad.clone() for name, value in job[1].values.items() if value.grad is not None}


def assert_close(shared: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    assert shared.keys() == own.keys()
    for name, gradient in own.items():
        assert gradient.abs().max() > 0
        # Sums in another order: 1e-6 of the largest was seen.
        error = (shared[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, (name, float(error))


SPECS = {
    "svdiff": [make_spec(**FP32, batch_size=n) for n in (1, 3, 2)],
    "anchored": [make_spec(**FP32, anchor_below=below) for below in (1000, 0, 600)],
    "residuals": [make_spec(Method.RESIDUALS, **FP32, gradient_accumulation=n) for n in (1, 4)],
    "lora": [make_spec(Method.LORA, **FP32, rank=2, alpha=alpha) for alpha in (1.0, 4.0)],
    "words": [make_spec(Method.TEXTUAL_INVERSION, **FP32, learning_rate=rate) for rate in (1e-2, 1e-3)],
    "layers": [make_spec(Method.TEXTUAL_INVERSION, **FP32, per_layer=True)] * 2,
    "halves": [
        make_pair_spec(**FP32, cut_mix_probability=0.9, unmix_weight=50.0, batch_size=3),
        make_spec(**FP32),
        make_pair_spec(**FP32, cut_mix_probability=0.9, unmix_weight=5.0, anchor_below=900),
    ],
    "checkpointed": [
        make_pair_spec(**FP32, cut_mix_probability=0.9, unmix_weight=50.0, gradient_checkpointing=True),
        make_spec(**FP32, gradient_checkpointing=True),
    ],
}


@pytest.mark.parametrize("kind", SPECS)
def test_every_job_gets_the_loss_and_the_gradients_that_it_has_alone(tiny: Tiny, kind: str) -> None:
    jobs = make_jobs(tiny, SPECS[kind])
    shares = make_shares(jobs)
    own = [alone(job, share) for job, share in zip(jobs, shares, strict=True)]
    results = step_together(jobs[0][0].unet, text_of(tiny), shares)
    for job, result, (loss, gradients) in zip(jobs, results, own, strict=True):
        assert isinstance(result, Tensor)
        assert result.item() == pytest.approx(loss.item(), rel=1e-5)
        assert_close(spread(job, result), gradients)


@pytest.mark.parametrize("kind", ["svdiff", "lora", "halves"])
def test_a_group_of_one_has_the_bits_of_a_job_alone(tiny: Tiny, kind: str) -> None:
    jobs = make_jobs(tiny, SPECS[kind][:1])
    shares = make_shares(jobs)
    loss, gradients = alone(jobs[0], shares[0])
    [result] = step_together(jobs[0][0].unet, text_of(tiny), shares)
    assert isinstance(result, Tensor)
    assert torch.equal(result, loss)
    shared = spread(jobs[0], result)
    assert shared.keys() == gradients.keys()
    assert all(torch.equal(shared[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("method", [Method.SVDIFF, Method.LORA])
def test_numbers_that_are_not_finite_stay_with_their_job(tiny: Tiny, method: Method) -> None:
    jobs = make_jobs(tiny, [make_spec(method, **FP32)] * 3)
    unet, text, batches = jobs[0][0].unet, text_of(tiny), draw(jobs)
    sound = [
        spread(job, result)
        for job, result in zip(jobs, step_together(unet, text, make_shares(jobs, batches)), strict=True)
    ]
    with torch.no_grad():
        for value in jobs[1][1].values.values():
            value.fill_(float("nan"))
    for _, state in jobs:
        state.forget_gradients()
    results = step_together(unet, text, make_shares(jobs, batches))
    assert isinstance(results[1], Tensor)
    assert bool(results[1].isnan())
    assert spread(jobs[1], results[1]) == {}
    for number in (0, 2):
        gradients = spread(jobs[number], results[number])
        assert all(torch.equal(gradients[name], gradient) for name, gradient in sound[number].items())


def test_a_loss_that_raises_fails_its_job_alone(tiny: Tiny) -> None:
    jobs = make_jobs(tiny, [make_spec(**FP32)] * 2)
    shares = make_shares(jobs)
    own = alone(jobs[1], shares[1])[1]

    def broken(*_: Any) -> Sequence[Tensor]:
        raise ValueError("no loss today")

    bad = Share(replace(shares[0].work, added=broken), jobs[0][1])
    results = step_together(jobs[0][0].unet, text_of(tiny), [bad, shares[1]])
    assert isinstance(results[0], ValueError)
    assert_close(spread(jobs[1], results[1]), own)


def test_an_update_that_fails_is_taken_by_nobody_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(tiny, [make_spec(**FP32)] * 3)

    def full(_states: Sequence[TrainingState]) -> None:
        raise torch.OutOfMemoryError("no room for moments")

    monkeypatch.setattr("hueshift.training.sharing.together.update_together", full)
    shares = make_shares(jobs)
    going_on = Share(shares[2].work, jobs[2][1], count=2, last=False)
    results = SharedStep(jobs[0][0].unet, text_of(tiny))([*shares[:2], going_on])
    # One that only adds gradients has lost nothing.
    assert [type(result) for result in results] == [torch.OutOfMemoryError, torch.OutOfMemoryError, Tensor]


class Memory:
    """Lets the UNet run on so many rows at once and no more."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        rows: int,
        refuse: Callable[[str], Exception] = torch.OutOfMemoryError,
    ) -> None:
        self.rows = rows
        self.tried: list[int] = []
        forward = AdaptedUNet.forward_rows

        def hungry(unet: AdaptedUNet, sample: Tensor, *others: Any) -> Tensor:
            self.tried.append(len(sample))
            if len(sample) > self.rows:
                raise refuse(f"{len(sample)} rows")
            return forward(unet, sample, *others)

        monkeypatch.setattr(AdaptedUNet, "forward_rows", hungry)


def no_workspace(_: str) -> Exception:
    """Memory that cuBLAS asks for itself."""
    return RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("refuse", [torch.OutOfMemoryError, no_workspace])
def test_without_memory_for_all_the_group_is_halved_and_stays_so(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[str], Exception]
) -> None:
    jobs = make_jobs(tiny, [make_spec(**FP32, anchor_below=0)] * 4)
    memory = Memory(monkeypatch, 4, refuse)
    step = SharedStep(jobs[0][0].unet, text_of(tiny))
    assert all(isinstance(result, Tensor) for result in step(make_shares(jobs)))
    assert (memory.tried, step.max_rows) == ([8, 4, 4], 4)
    memory.tried.clear()
    step(make_shares(jobs))
    assert memory.tried == [4, 4]


def test_what_nobody_uses_is_given_back_before_the_group_is_halved(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(tiny, [make_spec(**FP32, anchor_below=0)] * 4)
    memory, kept = Memory(monkeypatch, 4), [True]
    step = SharedStep(jobs[0][0].unet, text_of(tiny), release=lambda: bool(kept) and kept.pop())
    assert all(isinstance(result, Tensor) for result in step(make_shares(jobs)))
    # It helped not enough, and the second time there was nothing to give back.
    assert (memory.tried, step.max_rows) == ([8, 8, 4, 4], 4)


def test_only_what_cannot_run_alone_fails(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [make_spec(**FP32, anchor_below=0, batch_size=n) for n in (1, 3, 2)]
    jobs = make_jobs(tiny, specs)
    memory = Memory(monkeypatch, 2)
    results = SharedStep(jobs[0][0].unet, text_of(tiny))(make_shares(jobs))
    assert [type(result) for result in results] == [Tensor, torch.OutOfMemoryError, Tensor]
    assert memory.tried == [6, 1, 5, 3, 2]


def test_a_limit_on_rows_makes_groups(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(tiny, [make_spec(**FP32, anchor_below=0, batch_size=n) for n in (2, 1, 3, 5, 1)])
    memory = Memory(monkeypatch, 100)
    assert len(SharedStep(jobs[0][0].unet, text_of(tiny), max_rows=4)(make_shares(jobs))) == 5
    assert memory.tried == [3, 3, 5, 1]


@pytest.mark.parametrize("kind", ["svdiff", "anchored", "residuals", "lora", "words", "layers"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_captured_step_leaves_the_same_gradients(tiny: Tiny, kind: str, count: int) -> None:
    jobs = make_jobs(tiny, SPECS[kind][:count])
    unet, text, captured = jobs[0][0].unet, text_of(tiny), CapturedSteps(HostLane())
    for number in range(4):
        batches = draw(jobs)
        shares = make_shares(jobs, batches)
        own = [alone(job, share) for job, share in zip(jobs, shares, strict=True)]
        results = step_together(unet, text, make_shares(jobs, batches), captured)
        for job, result, (loss, gradients) in zip(jobs, results, own, strict=True):
            assert isinstance(result, Tensor)
            assert result.item() == pytest.approx(loss.item(), rel=1e-5)
            assert_close(spread(job, result), gradients)
        # Twice eagerly, then from what the second call was captured as.
        assert captured.captures == (0 if number == 0 else 1)


def test_what_looks_at_attention_or_weighs_positions_is_not_captured(tiny: Tiny) -> None:
    jobs = make_jobs(tiny, SPECS["halves"])
    captured = CapturedSteps(HostLane())
    for _ in range(3):
        results = step_together(jobs[0][0].unet, text_of(tiny), make_shares(jobs), captured)
        assert all(isinstance(result, Tensor) for result in results)
    assert captured.captures == 0
