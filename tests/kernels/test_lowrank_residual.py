"""lowrank_residual: reference against float64, kernels interpreted and cross-compiled, wrong arguments, GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.lowrank_residual import launches, lowrank_residual

Arguments = dict[str, Any]


def make(
    samples: int,
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    masked: bool = False,
    slots: int = 3,
) -> Arguments:
    """Return arguments with indices -1, 0, 1, 2, -1, ... and slabs that are slices of wider rows."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    slab_a = torch.randn(slots, rank * in_features + 24).to(dtype)
    slab_b = torch.randn(slots, out_features * rank + 8).to(dtype)
    mask = (torch.rand(samples, tokens) > 0.5).to(floats) if masked else None
    found = {
        "y": torch.randn(samples, tokens, out_features).to(dtype),
        "x": torch.randn(samples, tokens, in_features).to(dtype),
        "a": slab_a,
        "b": slab_b,
        "index": torch.arange(samples, dtype=torch.int32) % (slots + 1) - 1,
        "scales": torch.tensor([0.5, -1.0, 0.25, 2.0])[:slots].to(floats),
        "mask": mask,
    }
    found = {name: None if tensor is None else tensor.to(device) for name, tensor in found.items()}
    a, b = found["a"], found["b"]
    if a is not None and b is not None:
        found["a"] = a[:, 16 : 16 + rank * in_features].view(slots, rank, in_features)
        found["b"] = b[:, : out_features * rank].view(slots, out_features, rank)
    return found


def exact(arguments: Arguments) -> Tensor:
    """Return the result in float64, sample by sample."""
    y: Tensor = arguments["y"].double().clone()
    for n, slot in enumerate(arguments["index"].tolist()):
        if slot >= 0:
            a, b = arguments["a"][slot].double(), arguments["b"][slot].double()
            change = arguments["scales"][slot].double() * (arguments["x"][n].double() @ a.t() @ b.t())
            y[n] += change if arguments["mask"] is None else arguments["mask"][n].double()[:, None] * change
    return y


SIZES = [
    (1, 1, 1, 1, 1),
    (5, 7, 31, 13, 3),
    (4, 64, 64, 64, 64),
    (3, 65, 127, 129, 128),
    (0, 4, 8, 8, 2),
    (2, 0, 8, 8, 2),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    for size in SIZES:
        arguments = make(*size, dtype, masked=masked)
        want, y = exact(arguments), arguments["y"]
        assert lowrank_residual(**arguments) is y
        assert relative_error(y, want) <= TOLERANCES[dtype] or not y.numel()


def test_no_adapter_and_mask_zero_keep_every_bit() -> None:
    torch.manual_seed(0)
    arguments = make(4, 5, 8, 8, 2, torch.float16, masked=True)
    arguments["y"][:, :, 0] = -0.0
    before = arguments["y"].clone()
    lowrank_residual(**arguments)
    untouched = (arguments["mask"] == 0) | (arguments["index"] < 0)[:, None]
    bits, old = arguments["y"].view(torch.int16), before.view(torch.int16)
    assert torch.equal(bits[untouched], old[untouched])
    assert not torch.equal(bits[~untouched], old[~untouched])


def interpreted(size: list[int], dtype: str, masked: bool, fused: bool) -> dict[str, float]:
    """Run the kernels, one index far out of range, and return the error against float64."""
    torch.manual_seed(1)
    samples, tokens, in_features, out_features, rank = size
    arguments = make(samples, tokens, in_features, out_features, rank, getattr(torch, dtype), masked=masked)
    want = exact(arguments)
    if samples > 4:
        # Outside the slab: must be left alone, not read.
        arguments["index"][4] = 1_000_000
    config = LaunchConfig({"BLOCK_T": 32, "BLOCK_I": 32, "BLOCK_O": 32, "FUSED": fused}, 4, 2, 1, "")
    for launch in launches(**arguments, config=config):
        launch.run()
    return {"error": relative_error(arguments["y"], want) if want.numel() else 0.0}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("size", "dtype", "masked"),
    [
        ([1, 1, 1, 1, 1], "float16", True),
        ([5, 7, 31, 13, 3], "float32", False),
        ([4, 33, 64, 96, 16], "float16", True),
        ([4, 33, 64, 96, 12], "float16", True),
        ([2, 32, 96, 33, 128], "float16", False),
        ([0, 4, 8, 8, 2], "float16", False),
        ([2, 0, 8, 8, 2], "float16", False),
    ],
)
def test_kernels_interpreted(
    interpret: Callable[..., dict[str, float]], size: list[int], dtype: str, masked: bool, fused: bool
) -> None:
    found = interpret(__file__, "interpreted", size=size, dtype=dtype, masked=masked, fused=fused)
    assert found["error"] <= TOLERANCES[getattr(torch, dtype)]


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for shape_class in ("many_tokens", "few_tokens"):
        for number, config in enumerate(candidates(arch, "lowrank_residual", shape_class)):
            # The largest rank needs the most registers and shared memory.
            for rank, masked in ((128, True), (8, False))[: 2 if number == 0 else 1]:
                arguments = make(2, 64, 320, 640, rank, torch.float16, masked=masked)
                for launch in launches(**arguments, config=config):
                    found = cross_compile(launch, arch)
                    # A warp group multiplies 64 rows at least.
                    assert found.tensor_core == ("wgmma" if arch == "sm_90" and config["BLOCK_T"] >= 64 else "mma")
                    assert set(found.accesses("st")) == {16}
                    assert set(found.accesses("cp")) == {16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 3, 4, dtype=torch.int32)}, "y is int32"),
        ({"y": torch.zeros(2, 3)}, "y has shape"),
        ({"y": torch.zeros(2, 4, 3).transpose(1, 2)}, "y has strides"),
        ({"x": torch.zeros(2, 4, 5)}, "x has shape"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.float16)}, "x is float16"),
        ({"a": torch.zeros(3, 2, 6)}, "a has shape"),
        ({"a": torch.zeros(3, 129, 5), "b": torch.zeros(3, 4, 129)}, "rank 129"),
        ({"b": torch.zeros(2, 4, 2)}, "b has shape"),
        ({"b": torch.zeros(3, 2, 4).transpose(1, 2)}, "b has strides"),
        ({"index": torch.tensor([0, 3])}, "values 0..3"),
        ({"index": torch.tensor([-2, 0])}, "values -2..0"),
        ({"index": torch.tensor([0.0, 0.0])}, "index is float32"),
        ({"index": torch.tensor([0])}, "index has shape"),
        ({"index": torch.tensor([0, 9, 1, 9])[::2]}, "index has strides"),
        ({"y": torch.zeros(1, 3, 4).expand(2, 3, 4)}, "y has strides"),
        ({"y": torch.zeros(40).as_strided((2, 3, 4), (20, 3, 1))}, "tokens apart"),
        ({"scales": torch.ones(6)[::2]}, "scales has strides"),
        ({"scales": torch.ones(2)}, "scales has shape"),
        ({"scales": torch.ones(3, dtype=torch.float16)}, "scales is float16"),
        ({"mask": torch.ones(2, 4)}, "mask has shape"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask is bool"),
        ({"mask": torch.ones(3, 2).t()}, "mask has strides"),
        ({"x": torch.zeros(2, 3, 5, device="meta")}, "x is on meta"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    arguments = {**make(2, 3, 5, 4, 2, torch.float32), **change}
    with pytest.raises(KernelArgumentError, match=message):
        lowrank_residual(**arguments)


def test_x_and_y_must_not_share_memory() -> None:
    arguments = make(2, 3, 4, 4, 2, torch.float32)
    with pytest.raises(KernelArgumentError, match="overlap"):
        lowrank_residual(**{**arguments, "x": arguments["y"]})
    # Halves of one wide buffer interleave and are apart.
    both = torch.randn(2, 3, 8)
    lowrank_residual(**{**arguments, "y": both[:, :, :4], "x": both[:, :, 4:]})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16, 128])
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, rank: int
) -> None:
    for shape_class in ("many_tokens", "few_tokens"):
        for config in candidates(architecture(gpu), "lowrank_residual", shape_class):
            for samples, tokens, width in ((16, 1024, 640), (16, 64, 1280), (5, 77, 768), (3, 131, 127)):
                arguments = make(samples, tokens, width, 320, rank, dtype, device="cuda", masked=True)
                y, start = arguments["y"], arguments["y"].clone()

                def run(chosen: Arguments = arguments, with_config: LaunchConfig = config) -> None:
                    for launch in launches(**chosen, config=with_config):
                        launch.run()

                check_on_gpu(
                    reset=lambda to=y, origin=start: to.copy_(origin),
                    run=run,
                    outputs=[y],
                    expected=[exact(arguments)],
                    tolerance=TOLERANCES[dtype],
                )
