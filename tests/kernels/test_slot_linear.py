"""slot_linear: reference against float64, interpreted and compiled kernel, wrong arguments, GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.slot_linear import linear_launch, shape_class, slot_linear

Arguments = dict[str, Any]


def make(samples: int, tokens: int, depth: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    """Return arguments of one layer with three slots."""
    return {
        "x": torch.randn(samples, tokens, depth).to(device, dtype),
        "weights": (torch.randn(3, width, depth) * depth**-0.5).to(device, dtype),
        "index": (torch.arange(samples) % 3).to(device),
        "bias": torch.randn(width).to(device, dtype),
    }


def exact(arguments: Arguments) -> Tensor:
    """Return the result in float64, sample by sample, by torch's own layer."""
    x, weights, bias = (arguments[name].double() for name in ("x", "weights", "bias"))
    made = [torch.nn.functional.linear(x[n], weights[slot], bias) for n, slot in enumerate(arguments["index"].tolist())]
    return torch.stack(made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (4, 7, 31, 13), (3, 64, 33, 65)])
def test_reference_agrees_with_each_samples_own_layer(dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    arguments = make(*size, dtype)
    assert relative_error(slot_linear(**arguments), exact(arguments)) <= TOLERANCES[dtype]


def test_an_empty_batch_gives_an_empty_batch() -> None:
    assert slot_linear(**make(0, 5, 8, 4, torch.float32)).shape == (0, 5, 4)


def interpreted(size: list[int], dtype: str, bias: bool, constants: dict[str, Any]) -> dict[str, float]:
    """Run the kernel; return the error, and whether a wrong index gave NaN there alone."""
    torch.manual_seed(1)
    samples, tokens, depth, width = size
    arguments = make(samples, tokens, depth, width, getattr(torch, dtype))
    y = torch.full((samples, tokens, width), float("nan"), dtype=arguments["x"].dtype)
    config = LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "TMA": True, **constants}, 4, 2, 1, "")
    x, weights, index = (arguments[name] for name in ("x", "weights", "index"))
    used = arguments["bias"] if bias else None
    linear_launch(y, x, weights, index, used, config).run()
    if not bias:
        arguments["bias"].zero_()
    error = relative_error(y, exact(arguments)) if y.numel() else 0.0
    index[-1:] = 3
    linear_launch(y, x, weights, index, used, config).run()
    wrong = y.isnan()
    return {"error": error, "nan": float(bool(wrong[-1:].all()) and not bool(wrong[:-1].any()))}


@pytest.mark.parametrize(
    ("size", "dtype", "bias", "constants"),
    [
        ([1, 1, 1, 1], "float16", True, {}),
        ([4, 64, 64, 96], "float16", True, {"BLOCK_N": 64}),
        # Tiles of 32 tokens do not end with samples of 33.
        ([4, 33, 72, 40], "float16", False, {}),
        ([3, 50, 31, 33], "float32", True, {}),
        ([3, 64, 64, 64], "float16", True, {"TMA": False, "BLOCK_M": 64}),
        ([0, 4, 8, 8], "float16", True, {}),
    ],
)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]], size: list[int], dtype: str, bias: bool, constants: dict[str, Any]
) -> None:
    found = interpret(__file__, "interpreted", size=size, dtype=dtype, bias=bias, constants=constants)
    assert found["error"] <= TOLERANCES[getattr(torch, dtype)]
    assert found["nan"] == 1.0


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for width in (320, 640):
        x, weights = torch.zeros(2, 1024, 320, dtype=torch.float16), torch.zeros(3, width, 320, dtype=torch.float16)
        y, bias = torch.zeros(2, 1024, width, dtype=torch.float16), torch.zeros(width, dtype=torch.float16)
        for config in candidates(arch, "slot_linear", shape_class(width)):
            found = cross_compile(linear_launch(y, x, weights, torch.zeros(2, dtype=torch.int64), bias, config), arch)
            assert found.tensor_core == ("wgmma" if arch == "sm_90" else "mma")
            # Every stage is in use, though where a weight begins is read from memory.
            assert found.tma_copies == (2 * config.num_stages if config["TMA"] else 0)
            assert set(found.accesses("st")) == {16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x has shape"),
        ({"x": torch.zeros(2, 5, 3).transpose(1, 2)}, "x has strides"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.int8)}, "x is int8"),
        ({"weights": torch.zeros(4, 5)}, "weights has shape"),
        ({"weights": torch.zeros(3, 5, 4).transpose(1, 2)}, "weights has strides"),
        ({"weights": torch.zeros(3, 4, 5, dtype=torch.float64)}, "weights is float64"),
        ({"index": torch.tensor([0, 3])}, "values 0..3"),
        ({"index": torch.tensor([0, -1])}, "values -1..0"),
        ({"index": torch.tensor([0])}, "index has shape"),
        ({"index": torch.tensor([0, 9, 1, 9])[::2]}, "index has strides"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, "bias is float64"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    arguments = {**make(2, 3, 5, 4, torch.float32), **change}
    with pytest.raises(KernelArgumentError, match=message):
        slot_linear(**arguments)


def run_launch(y: Tensor, arguments: Arguments, config: LaunchConfig) -> None:
    """Run one configuration."""
    linear_launch(y, **arguments, config=config).run()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_configuration_on_a_gpu(gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype) -> None:
    for tokens, depth, width in ((4096, 320, 320), (1024, 640, 640), (960, 320, 2560), (77, 36, 36)):
        arguments = make(5, tokens, depth, width, dtype, "cuda")
        y = torch.empty(5, tokens, width, dtype=dtype, device=gpu)
        for config in candidates(architecture(gpu), "slot_linear", shape_class(width)):
            check_on_gpu(
                reset=lambda to=y: to.fill_(float("nan")),
                run=partial(run_launch, y, arguments, config),
                outputs=[y],
                expected=[exact(arguments)],
                tolerance=TOLERANCES[dtype],
            )
