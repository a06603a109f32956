"""layer_norm: reference against float64, both kinds of weights, kernel interpreted and compiled, arguments, GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.layer_norm import MAX_WIDTH, add_layer_norm, layer_norm, norm_launch, split_width

Arguments = dict[str, Any]
# Samples, tokens, width.
SIZES = [(1, 1, 2), (3, 5, 31), (2, 7, 40), (2, 3, 64), (1, 4, 320), (2, 2, 511), (2, 5, 257), (0, 4, 8), (2, 0, 8)]
EPS = 1e-5


def make(
    samples: int, tokens: int, width: int, dtype: torch.dtype, *, indexed: bool, device: str = "cpu", mean: float = 0.0
) -> Arguments:
    """Return arguments; with an index, weights are a slice of a wider slab."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    slab = torch.rand(5, width + 11, dtype=floats) + 0.5
    found = {
        "x": (torch.randn(samples, tokens, width, dtype=torch.float64) * 2 + mean).to(dtype),
        "weight": slab[:, 7 : 7 + width] if indexed else slab[0, 7 : 7 + width].to(dtype),
        "bias": torch.randn(width).to(dtype),
        "index": (torch.arange(samples) * 2) % 5 if indexed else None,
    }
    placed: Arguments = {name: None if tensor is None else tensor.to(device) for name, tensor in found.items()}
    if indexed and device != "cpu":
        # A copy to another device packs the slice.
        placed["weight"] = slab.to(device)[:, 7 : 7 + width]
    return {**placed, "eps": EPS}


def exact(arguments: Arguments) -> Tensor:
    """Return the result in float64."""
    x, weight, index = arguments["x"].double(), arguments["weight"].double(), arguments["index"]
    centred = x - x.mean(2, keepdim=True)
    normal = centred / (centred.square().mean(2, keepdim=True) + arguments["eps"]).sqrt()
    rows = weight[None, None] if index is None else weight[index.long()][:, None]
    result: Tensor = normal * rows + arguments["bias"].double()
    return result


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype, indexed: bool) -> None:
    torch.manual_seed(0)
    for samples, tokens, width in (*SIZES, (2, 3, 1), (1, 2, MAX_WIDTH)):
        arguments = make(samples, tokens, width, dtype, indexed=indexed)
        y = layer_norm(**arguments)
        assert y.shape == arguments["x"].shape
        assert y.dtype == dtype
        assert relative_error(y, exact(arguments)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_is_rounded_and_then_normalised(dtype: torch.dtype, indexed: bool) -> None:
    torch.manual_seed(0)
    for samples, tokens, width in SIZES:
        arguments = make(samples, tokens, width, dtype, indexed=indexed)
        residual = torch.randn_like(arguments["x"])
        total, y = add_layer_norm(residual=residual, **arguments)
        assert torch.equal(total, arguments["x"] + residual)
        assert torch.equal(y, layer_norm(**{**arguments, "x": total}))


def test_two_tiles_cover_a_row_and_waste_little() -> None:
    found = [split_width(width) for width in (320, 640, 1280, 768)]
    assert found == [(256, 64), (512, 128), (1024, 256), (512, 256)]
    for width in range(1, MAX_WIDTH + 1):
        main, tail = split_width(width)
        assert main >= 16
        assert not main & (main - 1)
        assert not tail & (tail - 1)
        # Both hold columns, and no single tile would do with fewer.
        assert (main < width <= main + tail) if tail else width <= main
        assert main + tail <= max(16, 1 << (width - 1).bit_length())


def interpreted(size: list[int], dtype: str, indexed: bool, mean: float, elements: int) -> dict[str, float]:
    """Run the kernel over a poisoned result; return the error, and whether a wrong index gave NaN there alone."""
    torch.manual_seed(1)
    samples, tokens, width = size
    arguments = make(samples, tokens, width, getattr(torch, dtype), indexed=indexed, mean=mean)
    out = torch.full_like(arguments["x"], float("nan"))
    config = LaunchConfig({"ELEMENTS": elements}, 4, 1, 1, "")
    norm_launch(out, **arguments, config=config).run()
    found = {"error": relative_error(out, exact(arguments)), "nan": 1.0}
    if indexed:
        for wrong in (5, -1):
            arguments["index"][-1:] = wrong
            norm_launch(out, **arguments, config=config).run()
            poisoned = out.isnan()
            found["nan"] *= float(bool(poisoned[-1:].all()) and not bool(poisoned[:-1].any()))
    return found


def interpreted_sum(size: list[int], dtype: str, indexed: bool) -> dict[str, float]:
    """Run the kernel with a sum before it; return the error of the norm, and how much of the sum is not torch's."""
    torch.manual_seed(1)
    samples, tokens, width = size
    arguments = make(samples, tokens, width, getattr(torch, dtype), indexed=indexed)
    residual = torch.randn_like(arguments["x"])
    out, total = (torch.full_like(residual, float("nan")) for _ in range(2))
    norm_launch(out, **arguments, residual=residual, total=total).run()
    expected = arguments["x"] + residual
    return {
        "wrong": float((total != expected).sum()),
        "error": relative_error(out, exact({**arguments, "x": expected})),
    }


@pytest.mark.parametrize("indexed", [True, False])
def test_a_sum_before_the_norm_interpreted(interpret: Callable[..., dict[str, float]], indexed: bool) -> None:
    for size in ((3, 5, 31), (2, 7, 40), (1, 4, 320), (2, 2, 511)):
        for dtype in ("float16", "float32"):
            found = interpret(__file__, "interpreted_sum", size=size, dtype=dtype, indexed=indexed)
            assert found["wrong"] == 0
            assert found["error"] <= TOLERANCES[getattr(torch, dtype)]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]], size: tuple[int, int, int], indexed: bool
) -> None:
    for dtype in ("float16", "float32"):
        found = interpret(__file__, "interpreted", size=size, dtype=dtype, indexed=indexed, mean=0.0, elements=1024)
        assert found["error"] <= TOLERANCES[getattr(torch, dtype)]
        assert found["nan"] == 1.0


def test_a_mean_far_from_zero_costs_no_digits(interpret: Callable[..., dict[str, float]]) -> None:
    # A variance of 4 beside a squared mean of 1e6: as a difference of sums in fp32 it would be off by some percent.
    found = interpret(
        __file__, "interpreted", size=[1, 3, 320], dtype="float32", indexed=False, mean=1e3, elements=1024
    )
    assert found["error"] <= 1e-4


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for number, config in enumerate(candidates(arch, "layer_norm")):
        for width in (320, 640, 1280):
            for indexed in (True, False):
                arguments = make(2, 64, width, torch.float16, indexed=indexed)
                found = cross_compile(norm_launch(arguments["x"], **arguments, config=config), arch)
                # Eight elements of 16 bits at a time.
                assert set(found.accesses("st")) == {16}
                assert found.accesses("ld")[16] >= found.accesses("st")[16]
                summed = norm_launch(
                    arguments["x"], **arguments, config=config, residual=arguments["x"], total=arguments["x"]
                )
                # ptxas spills 8 bytes for one more warp in a configuration of sm_80's and sm_89's sweeps.
                written = cross_compile(summed, arch, spills_allowed=arch != "sm_90" and number > 0).accesses("st")
                # The sum and the norm.
                assert written == {16: 2 * found.accesses("st")[16]}


def test_aligned_rows_of_a_slab_are_read_sixteen_bytes_at_a_time(cross_compile: Callable[..., Any]) -> None:
    arguments = make(2, 64, 1280, torch.float16, indexed=True)
    config = candidates("sm_90", "layer_norm")[0]
    # Steps between slots that 4 divides and 16 does not, as an adapter's row has them, and an odd one.
    for stride, narrow in ((222_700, False), (222_699, True)):
        arguments["weight"] = torch.empty(4 * stride + 1280).as_strided((5, 1280), (stride, 1))
        found = cross_compile(norm_launch(arguments["x"], **arguments, config=config), "sm_90").accesses("ld")
        # One read of 4 bytes is the index.
        assert (found[4] > 1) == narrow


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_the_widest_rows_compile(cross_compile: Callable[..., Any], arch: str) -> None:
    for config in candidates(arch, "layer_norm"):
        for width in (MAX_WIDTH, MAX_WIDTH - 1):
            arguments = make(1, 3, width, torch.float16, indexed=True)
            cross_compile(norm_launch(arguments["x"], **arguments, config=config), arch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, "x is int32"),
        ({"x": torch.zeros(2, 8)}, "x has shape"),
        ({"x": torch.zeros(2, 8, 3).transpose(1, 2)}, "x has strides"),
        ({"x": torch.zeros(2, 3, 0)}, r"x has 0 columns \(allowed: 1\.\.2048"),
        ({"x": torch.zeros(2, 3, 2049)}, r"x has 2049 columns \(allowed: 1\.\.2048"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"weight": torch.zeros(8)}, "weight has shape"),
        ({"weight": torch.zeros(5, 7)}, "weight has shape"),
        ({"weight": torch.zeros(5, 8, dtype=torch.float16)}, "weight is float16"),
        ({"weight": torch.zeros(5, 16)[:, ::2]}, "weight has strides"),
        ({"weight": torch.zeros(5, 8, device="meta")}, "weight is on meta"),
        ({"bias": torch.zeros(7)}, "bias has shape"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, "bias is float64"),
        ({"bias": torch.zeros(16)[::2]}, "bias has strides"),
        ({"index": torch.tensor([0, 5])}, r"index has values 0\.\.5"),
        ({"index": torch.tensor([0, -1])}, r"index has values -1\.\.0"),
        ({"index": torch.tensor([0])}, "index has shape"),
        ({"index": torch.tensor([0.0, 1.0])}, "index is float32"),
        ({"index": torch.zeros(4, dtype=torch.int64)[::2]}, "index has strides"),
        ({"index": None}, "weight has shape"),
        ({"index": None, "weight": torch.zeros(8, dtype=torch.float64)}, "weight is float64"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        layer_norm(**{**make(2, 3, 8, torch.float32, indexed=True), **change})


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.zeros(2, 3, 9), "residual has shape"),
        (torch.zeros(2, 3, 8, dtype=torch.float16), "residual is float16"),
        (torch.zeros(2, 8, 3).transpose(1, 2), "residual has strides"),
        (torch.zeros(2, 3, 8, device="meta"), "residual is on meta"),
    ],
)
def test_a_wrong_summand_is_refused(residual: Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        add_layer_norm(residual=residual, **make(2, 3, 8, torch.float32, indexed=True))


@pytest.mark.gpu
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, indexed: bool
) -> None:
    for config in candidates(architecture(gpu), "layer_norm"):
        for size in ((4, 4096, 320), (3, 77, 768), (6, 256, 1280), (2, 131, 97), (1, 3, MAX_WIDTH), (2, 5, 1)):
            arguments = make(*size, dtype, indexed=indexed, device="cuda")
            y = torch.empty_like(arguments["x"])
            check_on_gpu(
                reset=lambda to=y: to.fill_(float("nan")),
                run=norm_launch(y, **arguments, config=config).run,
                outputs=[y],
                expected=[exact(arguments)],
                tolerance=TOLERANCES[dtype],
            )
            residual, total = torch.randn_like(y), torch.empty_like(y)
            added = arguments["x"] + residual
            check_on_gpu(
                reset=lambda to=(y, total): [part.fill_(float("nan")) for part in to] and None,
                run=norm_launch(y, **arguments, config=config, residual=residual, total=total).run,
                outputs=[total, y],
                expected=[added, exact({**arguments, "x": added})],
                tolerance=TOLERANCES[dtype],
            )


@pytest.mark.gpu
def test_a_wrong_index_gives_nan_on_a_gpu(gpu: torch.device) -> None:
    arguments = make(3, 9, 320, torch.float16, indexed=True, device=str(gpu))
    arguments["index"][1] = 1_000_000
    wrong = layer_norm(**arguments).isnan()
    assert wrong[1].all()
    assert not wrong[0].any()
    assert not wrong[2].any()
