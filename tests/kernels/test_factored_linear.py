"""factored_linear: reference against float64, kernel interpreted and cross-compiled, wrong arguments, GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.factored_linear import factored_linear
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.product import product_launch, product_reference, shape_class

Arguments = dict[str, Any]


def make(
    samples: int, tokens: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> Arguments:
    """Return arguments with singular values that are a slice of a wider slab of three slots."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(samples, tokens, in_features).to(device, dtype),
        "u": (torch.randn(out_features, rank) * rank**-0.5).to(device, dtype),
        "vh": (torch.randn(rank, in_features) * in_features**-0.5).to(device, dtype),
        "sigma": torch.rand(3, rank + 9, dtype=floats).to(device)[:, 5 : 5 + rank],
        "index": (torch.arange(samples, dtype=torch.int64) % 3).to(device),
        "bias": torch.randn(out_features).to(device, dtype),
    }


def exact(arguments: Arguments) -> Tensor:
    """Return the result in float64, sample by sample."""
    u, vh = arguments["u"].double(), arguments["vh"].double()
    found = [
        (x.double() @ vh.t() * arguments["sigma"][slot].double()) @ u.t() + arguments["bias"].double()
        for x, slot in zip(arguments["x"], arguments["index"].tolist(), strict=True)
    ]
    return torch.stack(found) if found else torch.empty(0, *arguments["x"].shape[1:2], u.shape[0])


SIZES = [
    (1, 1, 1, 1, 1),
    (5, 7, 31, 13, 13),
    (2, 64, 64, 64, 64),
    (3, 65, 127, 129, 127),
    (4, 3, 36, 4, 1),
    (0, 4, 8, 8, 8),
    (2, 0, 8, 8, 8),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for size in SIZES:
        arguments = make(*size, dtype)
        y = factored_linear(**arguments)
        assert y.shape == (size[0], size[1], size[3])
        # Two products, each rounded once.
        assert relative_error(y, exact(arguments)) <= 2 * TOLERANCES[dtype] or not y.numel()


def test_samples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    arguments = make(4, 9, 16, 8, 8, torch.float32)
    mixed = factored_linear(**arguments)
    for n in range(4):
        alone = {**arguments, "x": arguments["x"][n : n + 1], "index": arguments["index"][n : n + 1]}
        assert relative_error(mixed[n : n + 1], factored_linear(**alone)) < 1e-6


def interpreted(size: list[int], dtype: str, own_weights: bool, constants: dict[str, Any]) -> dict[str, float]:
    """Run one product with scale and bias; return its error, and whether a wrong index gave NaN there alone."""
    torch.manual_seed(1)
    samples, tokens, in_features, out_features, _ = size
    kind = getattr(torch, dtype)
    arguments = make(samples, tokens, in_features, out_features, out_features, kind)
    x = arguments["x"].view(samples * tokens, in_features)
    shape = (samples, out_features, in_features) if own_weights else (out_features, in_features)
    weight = (torch.randn(shape) * in_features**-0.5).to(kind)
    y = torch.full((samples * tokens, out_features), float("nan"), dtype=kind)
    config = LaunchConfig(
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "TMA": True, "FLATTEN": False, **constants}, 4, 2, 1, ""
    )
    common: Arguments = {name: arguments[name] for name in ("sigma", "index", "bias")} | {"tokens": tokens}
    product_launch(y, x, weight, config=config, **common).run()
    wide = {name: value.double() if name in ("sigma", "bias") else value for name, value in common.items()}
    error = relative_error(y, product_reference(x.double(), weight.double(), **wide)) if y.numel() else 0.0
    arguments["index"][-1:] = 7
    product_launch(y, x, weight, config=config, **common).run()
    wrong = y.view(samples, tokens, out_features).isnan()
    return {"error": error, "nan": float(bool(wrong[-1:].all()) and not bool(wrong[:-1].any()))}


@pytest.mark.parametrize(
    ("size", "dtype", "own_weights", "constants"),
    [
        ([1, 1, 1, 1, 1], "float16", False, {}),
        ([3, 7, 31, 13, 0], "float32", False, {}),
        ([2, 64, 64, 96, 0], "float16", False, {"BLOCK_N": 64}),
        ([3, 33, 72, 40, 0], "float16", False, {"BLOCK_M": 64}),
        ([2, 64, 64, 64, 0], "float16", False, {"TMA": False}),
        ([0, 4, 8, 8, 0], "float16", False, {}),
        ([3, 64, 72, 40, 0], "float16", True, {}),
        ([2, 32, 31, 33, 0], "float32", True, {}),
        ([3, 64, 36, 96, 0], "float16", True, {"TMA": False, "BLOCK_N": 64}),
        ([0, 32, 8, 8, 0], "float16", True, {}),
    ],
)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]],
    size: list[int],
    dtype: str,
    own_weights: bool,
    constants: dict[str, Any],
) -> None:
    found = interpret(__file__, "interpreted", size=size, dtype=dtype, own_weights=own_weights, constants=constants)
    assert found["error"] <= 2 * TOLERANCES[getattr(torch, dtype)]
    assert found["nan"] == 1.0


def test_own_weights_need_tiles_that_end_with_a_sample() -> None:
    config = candidates("sm_90", "factored_conv", "whole_tiles")[0]
    x, weight = torch.zeros(2 * 96, 16, dtype=torch.float16), torch.zeros(2, 16, 16, dtype=torch.float16)
    with pytest.raises(KernelArgumentError, match="samples of 96 tokens"):
        product_launch(x, x, weight, tokens=96, config=config)


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for tokens, rank in ((256, 640), (256, 320), (64, 320), (77, 320)):
        for config in candidates(arch, "factored_linear", shape_class(tokens, rank)):
            arguments = make(2, tokens, 640, 640, rank, torch.float16)
            x = arguments["x"].view(2 * tokens, 640)
            shrunk = torch.zeros(2 * tokens, rank, dtype=torch.float16)
            first = product_launch(
                shrunk,
                x,
                arguments["vh"],
                tokens=tokens,
                config=config,
                sigma=arguments["sigma"],
                index=arguments["index"],
            )
            launches = [first]
            if not config["SECOND_CUBLAS"]:
                launches.append(
                    product_launch(x, shrunk, arguments["u"], tokens=tokens, config=config, bias=arguments["bias"])
                )
            for launch in launches:
                found = cross_compile(launch, arch)
                assert found.tensor_core == ("wgmma" if arch == "sm_90" else "mma")
                # Every stage is in use: a read behind another inside the loop would leave the pipeline flat.
                assert found.tma_copies == (2 * config.num_stages if config["TMA"] else 0)


def test_columns_that_tma_cannot_read_take_the_pointer_path(cross_compile: Callable[..., Any]) -> None:
    config = candidates("sm_90", "factored_linear", "whole_tiles")[0]
    x, weight = torch.zeros(128, 36, dtype=torch.float16), torch.zeros(36, 36, dtype=torch.float16)
    launch = product_launch(x, x, weight, tokens=128, config=config)
    assert launch.constants["TMA"] is False
    cross_compile(launch, "sm_90", spills_allowed=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 5, dtype=torch.int8)}, "x is int8"),
        ({"x": torch.zeros(2, 5)}, "x has shape"),
        ({"x": torch.zeros(2, 3, 6)}, "x has shape"),
        ({"x": torch.zeros(2, 5, 3).transpose(1, 2)}, "x has strides"),
        ({"u": torch.zeros(4, 2, dtype=torch.float16)}, "u is float16"),
        ({"u": torch.zeros(2, 4).t()}, "u has strides"),
        ({"u": torch.zeros(4, 3)}, "sigma has shape"),
        ({"vh": torch.zeros(3, 5)}, "vh has shape"),
        ({"vh": torch.zeros(5, 2).t()}, "vh has strides"),
        ({"sigma": torch.zeros(3, 3)}, "sigma has shape"),
        ({"sigma": torch.zeros(3, 2, dtype=torch.float16)}, "sigma is float16"),
        ({"sigma": torch.zeros(2, 3).t()}, "sigma has strides"),
        ({"index": torch.tensor([0, -1])}, "values -1..0"),
        ({"index": torch.tensor([0, 3])}, "values 0..3"),
        ({"index": torch.tensor([0, 1, 2])}, "index has shape"),
        ({"index": torch.tensor([0, 9, 1, 9])[::2]}, "index has strides"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, "bias is float64"),
        ({"vh": torch.zeros(2, 5, device="meta")}, "vh is on meta"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    arguments = {**make(2, 3, 5, 4, 2, torch.float32), **change}
    with pytest.raises(KernelArgumentError, match=message):
        factored_linear(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1024, 64, 77, 131])
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, tokens: int
) -> None:
    for in_features, rank in ((640, 320), (36, 36), (768, 1280)):
        for config in candidates(architecture(gpu), "factored_linear", shape_class(tokens, rank)):
            arguments = make(6, tokens, in_features, 320, rank, dtype, "cuda")
            x = arguments["x"].view(6 * tokens, in_features)
            y = torch.empty(6 * tokens, rank, dtype=dtype, device=gpu)
            common: Arguments = {"tokens": tokens, "sigma": arguments["sigma"], "index": arguments["index"]}
            want = product_reference(
                x.double(),
                arguments["vh"].double(),
                **{**common, "sigma": arguments["sigma"].double()},
            )
            check_on_gpu(
                reset=lambda to=y: to.fill_(float("nan")),
                run=product_launch(y, x, arguments["vh"], config=config, **common).run,
                outputs=[y],
                expected=[want],
                tolerance=TOLERANCES[dtype],
            )


@pytest.mark.gpu
def test_the_layer_on_a_gpu(gpu: torch.device) -> None:
    for size in ((6, 1024, 640, 320, 320), (3, 77, 768, 1280, 768), (2, 64, 36, 4, 4)):
        arguments = make(*size, torch.float16, "cuda")
        assert relative_error(factored_linear(**arguments), exact(arguments)) <= 2 * TOLERANCES[torch.float16]
    arguments["index"][0] = 99
    y = factored_linear(**arguments)
    assert bool(y[0].isnan().all())
    assert not bool(y[1].isnan().any())
