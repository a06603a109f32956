"""Middles of steps through torch.compile: what a plain step computes, or the plain step and a word in the log."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from structlog.testing import capture_logs
from tiny_middle import middle_of, plain
from tiny_training import make_spec, make_task
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.training.loop import draw_batch, make_work
from hueshift.training.methods.learnable import Rows
from hueshift.training.sharing.captured import CapturedSteps, Middle
from hueshift.training.sharing.compiled import Compiler, Errors, compiled_by, inductor, largest_difference
from hueshift.training.sharing.together import Share, step_together
from hueshift.training.spec import Precision
from hueshift.training.stepping import work_loss
from hueshift.training.unet import TrainingUNet

Tiny = tuple[BaseModel, SpectralFactors]


class Unet:
    """What CapturedSteps needs of one, with a network that is nothing but differentiable."""

    checkpointing = False

    def repeat_pixels(self) -> None:
        """It has none to repeat."""

    def __call__(self, noisy: Tensor, timesteps: Tensor, context: Tensor, rows: Rows) -> Tensor:
        """Run it."""
        return plain(noisy, timesteps, context, rows)

    def run_rows(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, spectral: Tensor | None, lowrank: Tensor | None
    ) -> Tensor:
        """The same for a compiler."""
        return plain(noisy, timesteps, context, Rows(spectral, lowrank))


def run(captured: CapturedSteps, given: Middle, unet: Any = None) -> list[Tensor]:
    """Errors and gradients of one call."""
    errors, gradients = captured.run(cast(TrainingUNet, unet or Unet()), given, Precision.FP32)
    return [part.clone() for part in (errors, *gradients)]


def assert_plain(found: list[Tensor], given: Middle) -> None:
    """To the bit what is computed without a compiler."""
    for part, own in zip(found, run(CapturedSteps(HostLane()), given), strict=True):
        assert torch.equal(part, own)


class Breaking:
    """A compiler that raises, or whose result is wrong, and counts calls of what it made."""

    def __init__(self, wrong: Callable[[Tensor], Tensor]) -> None:
        self.wrong = wrong
        self.calls = 0

    def __call__(self, errors: Errors) -> Errors:
        """Compile."""

        def call(*inputs: Any) -> Tensor:
            self.calls += 1
            return self.wrong(errors(*inputs))

        return call


def fail(error: Exception) -> Callable[[Tensor], Tensor]:
    """What raises."""

    def wrong(errors: Tensor) -> Tensor:
        raise error

    return wrong


def lose_a_part(errors: Tensor) -> Tensor:
    """The right number with a fifth of its gradient lost."""
    return 0.8 * errors + 0.2 * errors.detach()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (fail(RuntimeError("in code\n\nno C compiler\nmore")), "RuntimeError: in code no C compiler"),
        (lambda errors: errors * 1.01, "losses or gradients differ by 1.0e-02 of their size; allowed: 1e-03"),
        (lose_a_part, "losses or gradients differ by 2.0e-01 of their size; allowed: 1e-03"),
        (lambda errors: errors / 0, "losses or gradients differ by"),
    ],
    ids=["raises", "other numbers", "other gradients", "nan"],
)
def test_what_cannot_be_compiled_runs_plain_and_is_told_once(wrong: Callable[[Tensor], Tensor], told: str) -> None:
    compiler = Breaking(wrong)
    captured, given = CapturedSteps(HostLane(), compiler), middle_of(3)
    with capture_logs() as logs:
        for _ in range(4):
            assert_plain(run(captured, given), given)
    [line] = logs
    assert (line["event"], line["log_level"], line["rows"]) == ("training.compile_failed", "error", 3)
    assert line["error"].startswith(told)
    assert (compiler.calls, captured.captures) == (1, 1)


def test_each_shape_is_compared_and_then_runs_compiled_alone() -> None:
    compiler = Breaking(lambda errors: errors)
    captured = CapturedSteps(HostLane(), compiler)
    with capture_logs() as logs:
        for size in (1, 2, 1, 2, 1):
            assert_plain(run(captured, middle_of(size)), middle_of(size))
    assert [(line["event"], line["rows"]) for line in logs] == [("training.compiled", 1), ("training.compiled", 2)]
    assert compiler.calls == 5
    assert captured.captures == 2


def test_the_first_step_of_a_shape_has_the_bits_of_later_ones() -> None:
    captured, given = CapturedSteps(HostLane(), Breaking(lambda errors: errors * (1 + 1e-4))), middle_of(3)
    first, *later = [run(captured, given) for _ in range(3)]
    # A job that goes on in a new process begins with it, where an undisturbed one was further.
    assert all(torch.equal(one, other) for again in later for one, other in zip(first, again, strict=True))


def test_what_says_nothing_about_the_compiler_is_raised() -> None:
    captured = CapturedSteps(HostLane(), Breaking(fail(torch.OutOfMemoryError("no room"))))
    with capture_logs() as logs, pytest.raises(torch.OutOfMemoryError):
        run(captured, middle_of(1))

    def refuse(*_: Any) -> Tensor:
        raise ValueError("a defect")

    captured = CapturedSteps(HostLane(), Breaking(lambda errors: errors))
    with pytest.raises(ValueError, match="a defect"):
        run(captured, middle_of(1), cast(Any, type("Refusing", (Unet,), {"__call__": refuse, "run_rows": refuse})()))
    assert logs == []


def test_a_job_that_diverges_says_nothing_about_the_compiler() -> None:
    compiler = Breaking(lambda errors: errors)
    captured, lost = CapturedSteps(HostLane(), compiler), middle_of(2)
    lost.noisy.fill_(torch.nan)
    with capture_logs() as logs:
        run(captured, lost)
        assert logs == []
        run(captured, middle_of(2))
    assert [line["event"] for line in logs] == ["training.compiled"]


def test_with_activations_computed_again_nothing_is_compiled() -> None:
    unet, compiler = Unet(), Breaking(lambda errors: errors)
    unet.checkpointing = True
    with capture_logs() as logs:
        run(CapturedSteps(HostLane(), compiler), middle_of(1), unet)
    assert ([line["event"] for line in logs], compiler.calls) == (["training.not_compiled"], 0)


def test_differences_are_of_the_worst_part() -> None:
    ones = torch.ones(4)
    assert largest_difference([ones, 1.5 * ones], [ones, ones]) == pytest.approx(0.5)
    assert largest_difference([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert largest_difference([torch.full((2,), torch.nan), ones], [torch.zeros(2), ones]) != 0


def aot_eager() -> Compiler:
    """All of torch.compile but the code that it would write."""
    return compiled_by(lambda errors: torch.compile(errors, backend="aot_eager", fullgraph=True, dynamic=False))


def test_a_step_of_a_whole_unet_is_read_and_has_the_plain_steps_gradients(tiny: Tiny) -> None:
    task, state = make_task(*tiny, make_spec(precision="fp32", caption_dropout=0.0))
    captured = CapturedSteps(HostLane(), aot_eager())
    with capture_logs() as logs:
        for _ in range(3):
            work = make_work(task, state.values, draw_batch(task, state))
            loss = work_loss(task.unet, work)
            own = torch.autograd.grad(loss, list(state.values.values()))
            [result] = step_together(task.unet, TextStage(tiny[0]), [Share(work, state)], captured)
            assert isinstance(result, Tensor)
            assert result.item() == pytest.approx(loss.item(), rel=1e-5)
            found = [value.grad for value in state.values.values() if value.grad is not None]
            assert largest_difference(found, own) < 2e-5
    assert [line["event"] for line in logs] == ["training.compiled"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_inductor_takes_its_settings_and_writes_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    captured, given = CapturedSteps(HostLane(), inductor), middle_of(2)
    with capture_logs() as logs:
        first, second = run(captured, given), run(captured, given)
    assert [(line["event"], line.get("error")) for line in logs] == [("training.compiled", None)]
    assert largest_difference(second, first) < 1e-5
