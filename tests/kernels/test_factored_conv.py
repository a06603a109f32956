"""factored_conv: reference against float64 and the dense convolution, compiled kernels, wrong arguments, GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels import factored_conv as module
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.factored_conv import (
    expand,
    expand_class,
    expand_reference,
    factored_conv,
    reference,
    scale_and_expand,
    scale_launch,
)
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, architecture, candidates
from hueshift.kernels.product import product_launch

Arguments = dict[str, Any]


def make(
    samples: int, channels: int, out: int, side: int, kernel: int, dtype: torch.dtype, device: str = "cpu"
) -> Arguments:
    """Return arguments of one convolution of full rank on side x (side + 1) pixels."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    rank = min(out, channels * kernel * kernel)
    x = torch.randn(samples, channels, side, side + 1).to(device, dtype)
    vh = (torch.randn(rank, channels, kernel, kernel) * (channels * kernel * kernel) ** -0.5).to(device, dtype)
    return {
        "x": x.contiguous(memory_format=torch.channels_last),
        "u": (torch.randn(out, rank) * rank**-0.5).to(device, dtype),
        "vh": vh.contiguous(memory_format=torch.channels_last),
        "sigma": torch.rand(3, rank, dtype=floats).to(device),
        "index": (torch.arange(samples, dtype=torch.int32) % 3).to(device),
        "bias": torch.randn(out).to(device, dtype),
    }


def exact(arguments: Arguments, **geometry: int) -> Tensor:
    """Return the result in float64 by the dense convolution with each sample's own weight."""
    found = []
    for x, slot in zip(arguments["x"].double(), arguments["index"].tolist(), strict=True):
        scaled = arguments["u"].double() * arguments["sigma"][slot].double()
        weight = torch.einsum("or,rchw->ochw", scaled, arguments["vh"].double())
        found.append(functional.conv2d(x[None], weight, arguments["bias"].double(), **geometry))
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((1, 1, 1, 1, 1), {}),
        ((3, 5, 7, 9, 3), {"padding": 1}),
        ((2, 4, 32, 8, 3), {"padding": 1}),
        ((2, 32, 4, 8, 3), {"padding": 1}),
        ((4, 8, 8, 7, 3), {"stride": 2, "padding": 1}),
        ((3, 16, 8, 5, 1), {}),
        ((3, 16, 8, 5, 1), {"stride": 2}),
    ],
)
def test_agrees_with_each_samples_own_convolution(
    dtype: torch.dtype, size: tuple[int, int, int, int, int], geometry: dict[str, int]
) -> None:
    torch.manual_seed(0)
    arguments = make(*size, dtype)
    y, want = factored_conv(**{**arguments, **geometry}), exact(arguments, **geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The shrunk pixels are rounded once before the second product.
    assert relative_error(y, want) <= 2 * TOLERANCES[dtype]
    assert relative_error(reference(**{**arguments, **geometry}), want) <= TOLERANCES[dtype]


def test_an_empty_batch_gives_an_empty_batch() -> None:
    assert factored_conv(**make(0, 4, 8, 4, 1, torch.float32)).shape == (0, 8, 4, 5)
    assert factored_conv(**make(0, 4, 8, 4, 3, torch.float32), padding=1).shape == (0, 8, 4, 5)


def test_the_scale_goes_where_fewer_bytes_are() -> None:
    # SD1.5 at 512 pixels, from its largest pictures to its smallest; then a size whose rows 128 does not divide.
    sizes = ((4096, 320), (1024, 640), (256, 1280), (64, 1280), (960, 320))
    found = [expand_class(tokens, out) for tokens, out in sizes]
    assert found == ["narrow_tiles", "whole_tiles", "scaled_pixels", "scaled_pixels", "scaled_pixels"]


def interpreted(size: list[int], dtype: str, shared: bool) -> dict[str, float]:
    """Scale what one or every sample has; return the error, and whether a wrong index gave NaN there alone."""
    torch.manual_seed(1)
    samples, rows, width = size
    kind = getattr(torch, dtype)
    source = torch.randn(1 if shared else samples, rows, width).to(kind)
    slab = torch.rand(5, width + 3)
    sigma, index = slab[:, 2 : 2 + width], torch.arange(samples) % 5
    target = torch.full((samples, rows, width), float("nan"), dtype=kind)
    scale_launch(target, source, sigma, index).run()
    want = source.double() * sigma.double()[index][:, None]
    error = relative_error(target, want) if target.numel() else 0.0
    index[-1:] = 5
    scale_launch(target, source, sigma, index).run()
    wrong = target.isnan()
    return {"error": error, "nan": float(bool(wrong[-1:].all()) and not bool(wrong[:-1].any()))}


@pytest.mark.parametrize(
    ("size", "dtype", "shared"),
    [
        ([1, 1, 1], "float16", True),
        ([3, 65, 72], "float16", True),
        ([3, 64, 64], "float16", False),
        ([2, 7, 131], "float32", False),
        ([0, 8, 8], "float16", False),
    ],
)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]], size: list[int], dtype: str, shared: bool
) -> None:
    found = interpret(__file__, "interpreted", size=size, dtype=dtype, shared=shared)
    assert found["error"] <= TOLERANCES[getattr(torch, dtype)]
    assert found["nan"] == 1.0


def interpreted_layout(size: list[int]) -> dict[str, float]:
    """Run the launches of a GPU on pictures in both layouts; return the larger error against the reference."""
    torch.manual_seed(2)
    samples, rank, height, width = size
    shrunk = torch.randn(samples, rank, height, width).half()
    u, sigma = (torch.randn(24, rank) * rank**-0.5).half(), torch.rand(3, rank)
    index = torch.arange(samples) % 3
    want = scale_and_expand(shrunk.double(), u.double(), sigma.double(), index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "on_gpu", lambda _: True)
        layouts = (shrunk, shrunk.contiguous(memory_format=torch.channels_last))
        found = [scale_and_expand(pictures, u, sigma, index) for pictures in layouts]
    return {"error": max(relative_error(y, want) for y in found)}


# Few pixels are scaled, many have a weight of each sample's own.
@pytest.mark.parametrize("size", [[2, 16, 3, 4], [1, 16, 8, 16], [2, 16, 8, 16]])
def test_pictures_of_either_layout_interpreted(interpret: Callable[..., dict[str, float]], size: list[int]) -> None:
    assert interpret(__file__, "interpreted_layout", size=size)["error"] <= 2 * TOLERANCES[torch.float16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shrunk": torch.zeros(2, 8, 3)}, "shrunk has shape"),
        ({"shrunk": torch.zeros(2, 7, 3, 3)}, "shrunk has shape"),
        ({"shrunk": torch.zeros(2, 8, 3, 3, dtype=torch.int8)}, "shrunk is int8"),
        ({"u": torch.zeros(8, 16)[:, ::2]}, "u has strides"),
        ({"u": torch.zeros(8, 8, dtype=torch.float16)}, "u is float16"),
        ({"sigma": torch.zeros(3, 16)[:, ::2]}, "sigma has strides"),
        ({"index": torch.tensor([0])}, "index has shape"),
        ({"index": torch.tensor([0, 9, 1, 9])[::2]}, "index has strides"),
        ({"bias": torch.zeros(7)}, "bias has shape"),
    ],
)
def test_a_wrong_second_product_is_refused(change: Arguments, message: str) -> None:
    arguments = {
        "shrunk": torch.zeros(2, 8, 3, 3),
        "u": torch.zeros(8, 8),
        "sigma": torch.zeros(3, 8),
        "index": torch.tensor([0, 1]),
    }
    with pytest.raises(KernelArgumentError, match=message):
        scale_and_expand(**{**arguments, **change})


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for tokens, out in ((1024, 640), (256, 320), (64, 640), (99, 640)):
        shrunk, u = torch.zeros(2, tokens, 320, dtype=torch.float16), torch.zeros(1, out, 320, dtype=torch.float16)
        sigma, index = torch.zeros(3, 320), torch.zeros(2, dtype=torch.int32)
        own = torch.zeros(2, out, 320, dtype=torch.float16)
        for config in candidates(arch, "factored_conv", expand_class(tokens, out)):
            weights = config["SCALED_WEIGHTS"]
            scaled = scale_launch(own, u, sigma, index) if weights else scale_launch(shrunk, shrunk, sigma, index)
            # Eight elements of 16 bits at a time.
            assert set(cross_compile(scaled, arch).accesses("st")) == {16}
            if config["SECOND_CUBLAS"]:
                assert not weights
                continue
            y, bias = torch.zeros(2 * tokens, out, dtype=torch.float16), torch.zeros(out, dtype=torch.float16)
            weight = own if weights else u[0]
            launch = product_launch(y, shrunk.flatten(0, 1), weight, tokens=tokens, config=config, bias=bias)
            found = cross_compile(launch, arch)
            assert found.tensor_core == ("wgmma" if arch == "sm_90" else "mma")
            assert found.tma_copies == (2 * config.num_stages if config["TMA"] else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, "x has shape"),
        ({"x": torch.zeros(2, 4, 3, 3)}, "needed: channels_last"),
        ({"vh": torch.zeros(8, 5, 3, 3)}, "vh has shape"),
        ({"vh": torch.zeros(8, 36)}, "vh has shape"),
        ({"u": torch.zeros(8, 7)}, "sigma has shape"),
        ({"index": torch.tensor([0, 3])}, "values 0..3"),
        ({"index": torch.tensor([0])}, "index has shape"),
        ({"sigma": torch.zeros(3, 8, dtype=torch.bfloat16)}, "sigma is bfloat16"),
        ({"stride": 0}, "stride 0"),
        ({"padding": -1}, "padding -1"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        factored_conv(**{**make(2, 4, 8, 3, 3, torch.float32), "padding": 1, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((4, 320, 320, 31, 3), {"padding": 1}),
        ((4, 4, 320, 16, 3), {"padding": 1}),
        ((3, 320, 4, 16, 3), {"padding": 1}),
    ],
)
def test_convolutions_on_a_gpu(
    gpu: torch.device, dtype: torch.dtype, size: tuple[int, int, int, int, int], geometry: dict[str, int]
) -> None:
    arguments = make(*size, dtype, "cuda")
    y = factored_conv(**{**arguments, **geometry})
    assert y.device.type == gpu.type
    assert relative_error(y, exact(arguments, **geometry)) <= 2 * TOLERANCES[dtype]
    repeated = [factored_conv(**{**arguments, **geometry}) for _ in range(5)]
    assert all(relative_error(again, y) <= TOLERANCES[dtype] for again in repeated)


@pytest.mark.gpu
def test_the_scaled_product_on_a_gpu(gpu: torch.device, check_on_gpu: Callable[..., None]) -> None:
    arguments = make(6, 320, 640, 32, 1, torch.float16, "cuda")
    shrunk = torch.randn(6, 320, 32, 33, device=gpu, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    y = torch.empty(6, 640, 32, 33, device=gpu, dtype=torch.float16)
    scaled = shrunk.double() * arguments["sigma"].double()[arguments["index"].long()][:, :, None, None]
    want = functional.conv2d(scaled, arguments["u"].double()[:, :, None, None], arguments["bias"].double())
    check_on_gpu(
        reset=lambda: y.fill_(float("nan")),
        run=lambda: y.copy_(
            scale_and_expand(shrunk, arguments["u"], arguments["sigma"], arguments["index"], arguments["bias"])
        ),
        outputs=[y],
        expected=[want],
        tolerance=2 * TOLERANCES[torch.float16],
    )


def run_expand(y: Tensor, *arguments: Any) -> None:
    """Write the product into a tensor of the test's."""
    y.copy_(expand(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4096, 1024, 256, 64, 131])
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, tokens: int
) -> None:
    """Every class, through TMA and without it: 36 columns are too few for it."""
    for out, rank in ((320, 320), (1280, 1280), (640, 36)):
        pixels = torch.randn(3, tokens, rank, device=gpu).to(dtype)
        u = (torch.randn(out, rank, device=gpu) / rank**0.5).to(dtype)
        sigma, index = torch.rand(4, rank, device=gpu) + 0.5, torch.tensor([2, 0, 3], device=gpu)
        bias = torch.randn(out, device=gpu).to(dtype)
        want = expand_reference(pixels.double(), u.double(), sigma.double(), index, bias.double())
        y = torch.empty(3, tokens, out, dtype=dtype, device=gpu)
        for config in candidates(architecture(gpu), "factored_conv", expand_class(tokens, out)):
            check_on_gpu(
                reset=lambda to=y: to.fill_(float("nan")),
                run=partial(run_expand, y, pixels, u, sigma, index, bias, config),
                outputs=[y],
                expected=[want],
                tolerance=2 * TOLERANCES[dtype],
            )
