"""lowrank_linear: reference against float64, kernel interpreted and cross-compiled, wrong arguments, GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.compiled import compiled_ops
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.lowrank_linear import MAX_FUSED_RANK, fuses, linear_launch, lowrank_linear
from hueshift.kernels.product import shape_class

Arguments = dict[str, Any]


def make(
    samples: int, tokens: int, depth: int, width: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> Arguments:
    """Return arguments with indices -1, 0, 1, 2, -1, ... and slabs that are slices of wider rows."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    slab_a = torch.randn(3, rank * depth + 24).to(device, dtype)
    slab_b = (torch.randn(3, width * rank + 8) * 0.2).to(device, dtype)
    return {
        "x": torch.randn(samples, tokens, depth).to(device, dtype),
        "weight": (torch.randn(width, depth) * depth**-0.5).to(device, dtype),
        "bias": torch.randn(width).to(device, dtype),
        "a": slab_a[:, 16 : 16 + rank * depth].view(3, rank, depth),
        "b": slab_b[:, : width * rank].view(3, width, rank),
        "index": (torch.arange(samples, dtype=torch.int32) % 4 - 1).to(device),
        "scales": torch.tensor([0.5, -1.0, 0.0], dtype=floats).to(device),
        "mask": (torch.rand(samples, tokens) > 0.5).to(device, floats),
    }


def exact(arguments: Arguments) -> Tensor:
    """Return the result in float64, sample by sample."""
    x, bias = arguments["x"].double(), arguments["bias"]
    y: Tensor = x @ arguments["weight"].double().t() + (0.0 if bias is None else bias.double())
    for n, slot in enumerate(arguments["index"].tolist()):
        if 0 <= slot < 3:
            branch = x[n] @ arguments["a"][slot].double().t() @ arguments["b"][slot].double().t()
            change = arguments["scales"][slot].double() * branch
            y[n] += change if arguments["mask"] is None else arguments["mask"][n].double()[:, None] * change
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (5, 7, 31, 13, 3), (4, 128, 64, 64, 16), (0, 4, 8, 8, 2)])
def test_reference_agrees_with_float64(dtype: torch.dtype, size: tuple[int, int, int, int, int]) -> None:
    torch.manual_seed(0)
    arguments = make(*size, dtype)
    # The dense product is rounded before the branch is added.
    assert relative_error(lowrank_linear(**arguments), exact(arguments)) <= 2 * TOLERANCES[dtype]


def test_the_operator_is_the_function() -> None:
    torch.manual_seed(0)
    arguments, ops = make(2, 5, 8, 8, 2, torch.float32), compiled_ops()
    compiled = torch.compile(lambda *given: ops.lowrank_linear(*given), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments.values()), lowrank_linear(**arguments))


def test_what_the_fused_kernel_takes() -> None:
    good = make(2, 128, 64, 64, 16, torch.float16)

    def taken(**change: Tensor) -> bool:
        return fuses(*({**good, **change}[name] for name in ("x", "weight", "a", "b")))

    assert taken()
    # Text has 77 tokens, conv_in 36 columns; a slab's row may be of any length.
    assert not taken(x=torch.zeros(2, 77, 64, dtype=torch.float16))
    assert not taken(x=torch.zeros(2, 0, 64, dtype=torch.float16))
    assert not taken(weight=torch.zeros(36, 64, dtype=torch.float16))
    assert not taken(a=torch.zeros(3, MAX_FUSED_RANK + 1, 64, dtype=torch.float16))
    assert not taken(b=torch.zeros(3, 64 * 16 + 4, dtype=torch.float16)[:, : 64 * 16].view(3, 64, 16))


def interpreted(size: list[int], masked: bool, bias: bool, constants: dict[str, Any]) -> dict[str, float]:
    """Run the kernel, one index far out of range, and return the error against float64."""
    torch.manual_seed(1)
    samples, tokens, depth, width, rank = size
    arguments = make(samples, tokens, depth, width, rank, torch.float16)
    if not masked:
        arguments["mask"] = None
    if not bias:
        arguments["bias"] = None
    arguments["index"][-1:] = 1_000_000
    y = torch.full((samples, tokens, width), float("nan"), dtype=torch.float16)
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "TMA": True}
    linear_launch(y, **arguments, config=LaunchConfig({**blocks, **constants}, 4, 2, 1, "")).run()
    return {"error": relative_error(y, exact(arguments))}


@pytest.mark.parametrize(
    ("size", "masked", "bias", "constants"),
    [
        ([5, 64, 64, 64, 16], True, True, {}),
        ([3, 32, 72, 40, 12], False, True, {"BLOCK_N": 64}),
        ([4, 32, 40, 72, 3], True, False, {"TMA": False}),
        ([2, 64, 32, 32, 64], False, False, {"BLOCK_M": 64}),
    ],
)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]], size: list[int], masked: bool, bias: bool, constants: dict[str, Any]
) -> None:
    found = interpret(__file__, "interpreted", size=size, masked=masked, bias=bias, constants=constants)
    assert found["error"] <= TOLERANCES[torch.float16]


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for width in (320, 640):
        for number, config in enumerate(candidates(arch, "lowrank_linear", shape_class(128, width))):
            # The largest rank needs the most registers and shared memory.
            for rank in (MAX_FUSED_RANK, 8)[: 2 if number == 0 else 1]:
                arguments = make(2, 128, 320, width, rank, torch.float16)
                y = torch.zeros(2, 128, width, dtype=torch.float16)
                found = cross_compile(linear_launch(y, **arguments, config=config), arch)
                assert found.tensor_core == ("wgmma" if arch == "sm_90" else "mma")
                assert set(found.accesses("st")) == {16}
                # Every stage's tiles are asked for before the loop: the pipeline is as deep as the table says.
                assert found.tma_copies == (2 * config.num_stages if config["TMA"] else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x has shape"),
        ({"x": torch.zeros(2, 5, 3).transpose(1, 2)}, "x has strides"),
        ({"weight": torch.zeros(4, 6)}, "weight has shape"),
        ({"weight": torch.zeros(4, 5, dtype=torch.float16)}, "weight is float16"),
        ({"weight": torch.zeros(5, 4).t()}, "weight has strides"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
        ({"a": torch.zeros(3, 2, 6)}, "a has shape"),
        ({"b": torch.zeros(3, 5, 2)}, "b has shape"),
        ({"index": torch.tensor([0, 3])}, "values 0..3"),
        ({"mask": torch.ones(2, 4)}, "mask has shape"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        lowrank_linear(**{**make(2, 3, 5, 4, 2, torch.float32), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, rank: int
) -> None:
    for samples, tokens, depth, width in ((16, 1024, 640, 640), (16, 256, 1280, 320), (5, 128, 768, 1280)):
        arguments = make(samples, tokens, depth, width, rank, dtype, "cuda")
        y = torch.empty(samples, tokens, width, dtype=dtype, device=gpu)
        for config in candidates(architecture(gpu), "lowrank_linear", shape_class(tokens, width)):
            check_on_gpu(
                reset=lambda to=y: to.fill_(float("nan")),
                run=linear_launch(y, **arguments, config=config).run,
                outputs=[y],
                expected=[exact(arguments)],
                tolerance=TOLERANCES[dtype],
            )
