"""residual_add: reference against float64, both layouts, kernel interpreted and compiled, wrong arguments, GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.residual_add import add_launch, packed_format, reference, residual_add

SHAPES = [(1,), (3, 7), (2, 5, 31), (1, 9, 64), (0, 4, 8), (2, 13, 5, 7), (3, 8, 1, 1), (1, 1, 5, 4), (2, 40, 3, 11)]


def make(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y and bias."""
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x, y = (torch.randn(*shape).to(device, dtype).contiguous(memory_format=form) for _ in range(2))
    return x, y, torch.randn(shape[1] if len(shape) == 4 else shape[-1]).to(device, dtype)


def exact(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum in float64."""
    total = x.double() + y.double()
    if bias is None:
        return total
    return total + bias.double().view(-1, *[1] * (x.dim() - 2 if x.dim() == 4 else 0))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        x, y, every = make(shape, dtype)
        bias = every if with_bias else None
        found = residual_add(x, y, bias)
        assert found.shape == x.shape
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=packed_format(x))
        assert relative_error(found, exact(x, y, bias)) <= TOLERANCES[dtype]


def test_the_sum_is_rounded_once() -> None:
    # In fp16 2048 + 1 is 2048, twice; the sum of all three has its place.
    x, one = torch.full((1, 1), 2048.0, dtype=torch.float16), torch.ones(1, 1, dtype=torch.float16)
    assert float(residual_add(x, one, one[0])) == 2050.0


def interpreted(shape: list[int], dtype: str, with_bias: bool) -> dict[str, float]:
    """Run the kernel over a poisoned result and return its error."""
    torch.manual_seed(1)
    x, y, every = make(shape, getattr(torch, dtype))
    bias = every if with_bias else None
    out = torch.full_like(x, float("nan"))
    add_launch(out, x, y, bias, LaunchConfig({"BLOCK": 64}, 4, 1, 1, "")).run()
    return {"error": relative_error(out, exact(x, y, bias))}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]], shape: tuple[int, ...], with_bias: bool
) -> None:
    for dtype in ("float16", "float32"):
        found = interpret(__file__, "interpreted", shape=shape, dtype=dtype, with_bias=with_bias)
        assert found["error"] <= TOLERANCES[getattr(torch, dtype)]


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for config in candidates(arch, "residual_add"):
        # Widths of SD1.5, and one that 8 divides and 16 does not.
        for width in (320, 1280, 40):
            x, y, bias = make((2, 63, width), torch.float16)
            for given in (bias, None):
                found = cross_compile(add_launch(x, x, y, given, config), arch)
                # Eight elements of 16 bits at a time, of the bias as well.
                assert set(found.accesses("st")) == {16}
                assert set(found.accesses("ld")) == {16}


@pytest.mark.parametrize(
    ("x", "y", "bias", "message"),
    [
        (torch.tensor(0.0), torch.tensor(0.0), None, "x is a scalar"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3), None, "x is int32"),
        (torch.zeros(2, 3), torch.zeros(2, 4), None, "y has shape"),
        (torch.zeros(2, 3), torch.zeros(1, 3), None, "y has shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16), None, "y is float16"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), None, "y is on meta"),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), None, "x has strides .*needed: contiguous"),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), None, "y has strides"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), None, "x has strides .*needed: channels_last"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), "bias has shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(6)[::2], "bias has strides"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64), "bias is float64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, device="meta"), "bias is on meta"),
    ],
)
def test_wrong_arguments_are_refused(x: Tensor, y: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        residual_add(x, y, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_configuration_on_a_gpu(gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype) -> None:
    for config in candidates(architecture(gpu), "residual_add"):
        for shape in ((4, 320, 64, 64), (3, 4096, 320), (3, 97, 13, 11), (1, 1, 1)):
            x, y, every = make(shape, dtype, "cuda")
            for bias in (every, None):
                out = torch.empty_like(x)
                check_on_gpu(
                    reset=lambda to=out: to.fill_(float("nan")),
                    run=add_launch(out, x, y, bias, config).run,
                    outputs=[out],
                    expected=[exact(x, y, bias)],
                    tolerance=TOLERANCES[dtype],
                )


@pytest.mark.gpu
def test_the_whole_call_on_a_gpu(gpu: torch.device) -> None:
    x, y, bias = make((2, 320, 9, 7), torch.float16, str(gpu))
    found = residual_add(x, y, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, reference(x, y, bias))
    with pytest.raises(KernelArgumentError, match="x is float32"):
        residual_add(x.float(), y.float())
