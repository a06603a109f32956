"""sampler_step: reference against float64, kernel interpreted and cross-compiled, wrong arguments, GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.sampler_step import sampler_step, step_launch

Arguments = dict[str, Any]


def make(
    samples: int, shape: list[int], dtype: torch.dtype, *, device: str = "cpu", noisy: bool = True, wide: bool = False
) -> Arguments:
    """Return arguments where guided and unguided samples share a batch; unused prev and noise are NaN."""
    floats = torch.float64 if wide else torch.float32
    coefficients = torch.randn(samples, 6, dtype=floats)
    coefficients[::2, 2] = 0
    coefficients[:, 3] *= torch.arange(samples) % 3 == 1
    if not noisy:
        coefficients[:, 3] = 0
    prev, noise = torch.randn(samples, *shape, dtype=floats), torch.randn(samples, *shape, dtype=floats)
    prev[coefficients[:, 2] == 0] = float("nan")
    noise[coefficients[:, 3] == 0] = float("nan")
    uncond = torch.arange(samples, dtype=torch.int64)
    uncond[1::3] = -1
    found = {
        "x": torch.randn(samples, *shape, dtype=floats),
        "prev": prev,
        "out": torch.randn(2 * samples + 1, *shape).to(dtype),
        "cond_rows": torch.arange(samples) + samples + 1,
        "uncond_rows": uncond,
        "guidance": torch.rand(samples, dtype=floats) * 7,
        "coefficients": coefficients,
        "noise": noise if noisy else None,
    }
    return {name: None if tensor is None else tensor.to(device) for name, tensor in found.items()}


def exact(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return the new x and prev in float64, sample by sample."""
    x, prev = arguments["x"].double().clone(), arguments["prev"].double().clone()
    for n in range(x.shape[0]):
        a, b, c, d, e, f = arguments["coefficients"][n].double()
        out = arguments["out"][arguments["cond_rows"][n]].double()
        if arguments["uncond_rows"][n] >= 0:
            uncond = arguments["out"][arguments["uncond_rows"][n]].double()
            out = uncond + arguments["guidance"][n].double() * (out - uncond)
        step = a * x[n] + b * out
        step = step + c * prev[n] if c else step
        step = step + d * arguments["noise"][n].double() if d else step
        x[n], prev[n] = step, e * x[n] + f * out
    return x, prev


SIZES = [(1, [1]), (3, [4, 7, 5]), (7, [4, 8, 8]), (2, [1023]), (4, [1025]), (0, [4, 8, 8])]


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype, noisy: bool) -> None:
    torch.manual_seed(0)
    for samples, shape in SIZES:
        arguments = make(samples, shape, dtype, noisy=noisy, wide=dtype == torch.float64)
        want = exact(arguments)
        sampler_step(**arguments)
        for got, expected in zip((arguments["x"], arguments["prev"]), want, strict=True):
            assert relative_error(got, expected) <= (1e-13 if dtype == torch.float64 else 1e-6)


def test_a_ddim_step_of_both_predictions_lands_on_the_same_point() -> None:
    torch.manual_seed(0)
    alpha, after = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    clean, noise = torch.randn(2, 1, 4, dtype=torch.float64)
    x = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    ratio = (after / alpha).sqrt()
    b = (1 - after).sqrt() - ratio * (1 - alpha).sqrt()
    epsilon_row = torch.stack([ratio, b, 0 * b, 0 * b, 1 / alpha.sqrt(), -((1 / alpha - 1).sqrt())])
    # eps = sqrt(alpha) v + sqrt(1 - alpha) x and x0 = sqrt(alpha) x - sqrt(1 - alpha) v.
    a = after.sqrt() * alpha.sqrt() + (1 - after).sqrt() * (1 - alpha).sqrt()
    b = (1 - after).sqrt() * alpha.sqrt() - after.sqrt() * (1 - alpha).sqrt()
    velocity_row = torch.stack([a, b, 0 * b, 0 * b, alpha.sqrt(), -((1 - alpha).sqrt())])
    want = after.sqrt() * clean + (1 - after).sqrt() * noise
    for out, row in ((noise, epsilon_row), (velocity, velocity_row)):
        here, prev = x.clone(), torch.zeros_like(x)
        rows, none = torch.tensor([0]), torch.tensor([-1])
        sampler_step(here, prev, out, rows, none, torch.ones(1, dtype=torch.float64), row[None])
        assert relative_error(here, want) < 1e-12
        assert relative_error(prev, clean) < 1e-12


def interpreted(samples: int, shape: list[int], dtype: str, noisy: bool) -> dict[str, float]:
    """Run the kernel and return both errors, and whether a row outside the batch made its sample NaN, no other."""
    torch.manual_seed(1)
    arguments = make(samples, shape, getattr(torch, dtype), noisy=noisy)
    want = exact(arguments)
    config = LaunchConfig({"BLOCK": 128}, 4, 1, 1, "")
    step_launch(**arguments, config=config).run()
    errors = [relative_error(got, w) for got, w in zip((arguments["x"], arguments["prev"]), want, strict=True)]
    arguments = make(samples, shape, getattr(torch, dtype), noisy=noisy)
    arguments["cond_rows"][-1:] = 1_000_000
    step_launch(**arguments, config=config).run()
    wrong = arguments["x"].isnan()
    return {"x": errors[0], "prev": errors[1], "nan": float(bool(wrong[-1:].all()) and not bool(wrong[:-1].any()))}


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize(
    ("samples", "shape", "dtype"),
    [(1, [1], "float16"), (5, [4, 7, 5], "float32"), (3, [127], "float16"), (2, [129], "float16"), (0, [4], "float16")],
)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]], samples: int, shape: list[int], dtype: str, noisy: bool
) -> None:
    found = interpret(__file__, "interpreted", samples=samples, shape=shape, dtype=dtype, noisy=noisy)
    assert found["x"] <= 1e-6
    assert found["prev"] <= 1e-6
    assert found["nan"] == 1.0


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for config in candidates(arch, "sampler_step"):
        for noisy in (True, False):
            found = cross_compile(step_launch(**make(2, [4, 64, 64], torch.float16, noisy=noisy), config=config), arch)
            # Bandwidth-bound: 16 bytes at a time.
            assert set(found.accesses("st")) == {16}
            assert found.accesses("ld")[16] >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.float16)}, "x is float16"),
        ({"x": torch.tensor(0.0)}, "scalar"),
        ({"prev": torch.zeros(2, 4)}, "prev has shape"),
        ({"out": torch.zeros(5, 4)}, "out has shape"),
        ({"out": torch.zeros(5, 3, dtype=torch.int32)}, "out is int32"),
        ({"out": torch.zeros(3, 5).t()}, "out has strides"),
        ({"cond_rows": torch.tensor([0, 5])}, r"cond_rows has \[0, 5\]"),
        ({"cond_rows": torch.tensor([0, -1])}, r"cond_rows has \[0, -1\]"),
        ({"uncond_rows": torch.tensor([-2, 0])}, r"uncond_rows has \[-2, 0\]"),
        ({"uncond_rows": torch.tensor([0, 0], dtype=torch.int32)}, "uncond_rows is int32"),
        ({"cond_rows": torch.tensor([0.0, 1.0])}, "cond_rows is float32"),
        ({"guidance": torch.zeros(3)}, "guidance has shape"),
        ({"coefficients": torch.zeros(2, 5)}, "coefficients has shape"),
        ({"coefficients": torch.ones(2, 6), "noise": None}, "noise is None"),
        ({"noise": torch.zeros(2, 2)}, "noise has shape"),
        ({"noise": torch.zeros(2, 3, dtype=torch.float64)}, "noise is float64"),
        ({"out": torch.zeros(5, 3, device="meta")}, "out is on meta"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    arguments = {**make(2, [3], torch.float32), **change}
    with pytest.raises(KernelArgumentError, match=message):
        sampler_step(**arguments)


@pytest.mark.parametrize(("name", "other"), [("prev", "x"), ("out", "x"), ("out", "prev")])
def test_what_is_written_shares_no_memory(name: str, other: str) -> None:
    arguments = make(2, [3], torch.float32)
    rows = {"cond_rows": torch.tensor([0, 1]), "uncond_rows": torch.tensor([1, 0])}
    with pytest.raises(KernelArgumentError, match=f"{other}.* overlap"):
        sampler_step(**{**arguments, **rows, name: arguments[other]})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_configuration_on_a_gpu(gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype) -> None:
    for config in candidates(architecture(gpu), "sampler_step"):
        for samples, shape in ((16, [4, 64, 64]), (3, [4, 97, 61]), (1, [1])):
            arguments = make(samples, shape, dtype, device="cuda")
            start = {name: arguments[name].clone() for name in ("x", "prev")}

            def reset(to: Arguments = arguments, origin: Arguments = start) -> None:
                to["x"].copy_(origin["x"])
                to["prev"].copy_(origin["prev"])

            check_on_gpu(
                reset=reset,
                run=step_launch(**arguments, config=config).run,
                outputs=[arguments["x"], arguments["prev"]],
                expected=list(exact(arguments)),
                tolerance=TOLERANCES[torch.float32],
            )
