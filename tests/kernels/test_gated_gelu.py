"""gated_gelu: reference against float64 and diffusers, kernel interpreted and cross-compiled, wrong arguments, GPU."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.gated_gelu import gated_gelu, gelu_launch
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates

SIZES = [(1, 1, 1), (3, 7, 31), (2, 5, 64), (1, 9, 127), (2, 3, 257), (0, 4, 8), (2, 0, 8), (5, 11, 40)]


def exact(x: Tensor) -> Tensor:
    """Return the result in float64 by the complementary error function, which loses no digits of small results."""
    value, gate = x.double().chunk(2, dim=2)
    below: Tensor = torch.special.erfc(-gate / math.sqrt(2)) / 2
    return value * gate * below


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for samples, tokens, width in SIZES:
        x = (torch.randn(samples, tokens, 2 * width, dtype=torch.float64) * 2).to(dtype)
        y = gated_gelu(x)
        assert y.shape == (samples, tokens, width)
        assert y.dtype == dtype
        assert relative_error(y, exact(x)) <= TOLERANCES[dtype]


def test_is_what_diffusers_computes() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    torch.manual_seed(0)
    layer = activations.GEGLU(8, 24)
    x = torch.randn(2, 5, 8)
    assert torch.equal(gated_gelu(layer.proj(x)), layer(x))


def interpreted(size: list[int], dtype: str, block: list[int]) -> dict[str, float]:
    """Run the kernel over a poisoned result and return its error."""
    torch.manual_seed(1)
    samples, tokens, width = size
    x = (torch.randn(samples, tokens, 2 * width) * 2).to(getattr(torch, dtype))
    out = torch.full((samples, tokens, width), float("nan"), dtype=x.dtype)
    config = LaunchConfig({"BLOCK_T": block[0], "BLOCK_C": block[1]}, 4, 1, 1, "")
    gelu_launch(out, x, config).run()
    return {"error": relative_error(out, exact(x))}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", SIZES)
def test_kernel_interpreted(interpret: Callable[..., dict[str, float]], size: tuple[int, int, int], dtype: str) -> None:
    found = interpret(__file__, "interpreted", size=size, dtype=dtype, block=[4, 64])
    assert found["error"] <= TOLERANCES[getattr(torch, dtype)]


def interpreted_range() -> dict[str, float]:
    """Run the kernel in float32 on gates from -12 to 12 and the ends of the range; return the largest errors."""
    gates = torch.cat([torch.linspace(-12, 12, 4097), torch.tensor([-3e38, 3e38, 0.0])])
    x = torch.cat([torch.ones(1, 1, 4100), gates[None, None]], 2)
    out = torch.empty(1, 1, 4100)
    gelu_launch(out, x, LaunchConfig({"BLOCK_T": 1, "BLOCK_C": 4096}, 4, 1, 1, "")).run()
    difference = (out.double() - exact(x)).flatten()
    x[..., 4097] = 3e38
    gelu_launch(out, x, LaunchConfig({"BLOCK_T": 1, "BLOCK_C": 4096}, 4, 1, 1, "")).run()
    ends = out.flatten()[4097:].tolist()
    return {
        "error": float(difference[:4097].abs().max()),
        "low": ends[0],
        "high": ends[1] / 3e38,
        "zero": ends[2],
        "product": float(out.flatten()[4097]),
    }


def test_the_formula_is_gelu_over_its_whole_range(interpret: Callable[..., dict[str, float]]) -> None:
    found = interpret(__file__, "interpreted_range")
    assert found["error"] <= 6e-7
    assert (found["low"], found["zero"], found["product"]) == (0.0, 0.0, 0.0)
    assert found["high"] == pytest.approx(1.0)


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for config in candidates(arch, "gated_gelu"):
        # The widest and narrowest of SD1.5, and a width that 8 divides and 16 does not.
        for width in (1280, 5120, 40):
            x = torch.zeros(2, 64, 2 * width, dtype=torch.float16)
            found = cross_compile(gelu_launch(torch.zeros(2, 64, width, dtype=torch.float16), x, config), arch)
            # Eight elements of 16 bits at a time.
            assert set(found.accesses("st")) == {16}
            assert set(found.accesses("ld")) == {16}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.int32), "x is int32"),
        (torch.zeros(2, 4), "x has shape"),
        (torch.zeros(2, 3, 5), "x has 5 columns"),
        (torch.zeros(2, 4, 3).transpose(1, 2), "x has strides"),
    ],
)
def test_wrong_arguments_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        gated_gelu(x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_configuration_on_a_gpu(gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype) -> None:
    for config in candidates(architecture(gpu), "gated_gelu"):
        for samples, tokens, width in ((4, 4096, 1280), (3, 131, 97), (2, 64, 5120), (1, 1, 1)):
            x = (torch.randn(samples, tokens, 2 * width, device=gpu) * 2).to(dtype)
            y = torch.empty(samples, tokens, width, device=gpu, dtype=dtype)
            check_on_gpu(
                reset=lambda to=y: to.fill_(float("nan")),
                run=gelu_launch(y, x, config).run,
                outputs=[y],
                expected=[exact(x)],
                tolerance=TOLERANCES[dtype],
            )


@pytest.mark.gpu
def test_the_whole_call_on_a_gpu(gpu: torch.device) -> None:
    x = torch.randn(2, 77, 640, device=gpu, dtype=torch.float16)
    assert relative_error(gated_gelu(x), exact(x)) <= TOLERANCES[torch.float16]
    with pytest.raises(KernelArgumentError, match="x is float32"):
        gated_gelu(x.float())
