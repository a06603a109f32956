"""lag_mask: reference against float64, kernels interpreted and cross-compiled, wrong arguments, GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.lag_mask import attention_share, binarise, lag_mask, median_launch, share_launch
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates

Arguments = dict[str, Any]


def make(
    samples: int, heads: int, positions: int, keys: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> Arguments:
    """Return arguments as attention layers hold them: heads side by side inside each position."""
    q = torch.randn(samples, positions, heads, width).to(device, dtype).transpose(1, 2)
    k = torch.randn(samples, keys, heads, width).to(device, dtype).transpose(1, 2)
    chosen = torch.zeros(samples, keys, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    chosen[:, : max(1, keys // 5)] = 1
    if samples > 1:
        chosen[-1] = 0
    return {"q": q, "k": k, "chosen": chosen.to(device), "scale": width**-0.5}


def exact_share(arguments: Arguments) -> Tensor:
    """Return the share in float64, head by head."""
    samples, heads, positions, _ = arguments["q"].shape
    total: Tensor = torch.zeros(samples, positions, dtype=torch.float64, device=arguments["q"].device)
    for head in range(heads):
        logits = arguments["q"][:, head].double() @ arguments["k"][:, head].double().transpose(1, 2)
        probability = torch.softmax(logits * arguments["scale"], 2)
        total += (probability * arguments["chosen"].double()[:, None, :]).sum(2)
    share: Tensor = total / heads
    return share


SIZES = [(1, 1, 1, 1, 1), (3, 2, 7, 5, 3), (2, 8, 64, 77, 40), (2, 3, 65, 128, 33), (0, 2, 8, 77, 8), (2, 2, 0, 77, 8)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for size in SIZES:
        arguments = make(*size, dtype)
        share, want = attention_share(**arguments), exact_share(arguments)
        # Inputs are upcast exactly, and the share is kept in fp32.
        assert relative_error(share, want) <= (1e-13 if dtype == torch.float64 else 2e-6)
        mask = lag_mask(**arguments)
        assert mask.shape == (size[0], size[2])
        assert torch.equal(mask, binarise(share))


def test_half_the_positions_pass_ties_pass_and_no_token_means_everywhere() -> None:
    torch.manual_seed(0)
    assert binarise(torch.rand(5, 64)).sum(1).tolist() == [32] * 5
    assert binarise(torch.rand(5, 7)).sum(1).tolist() == [4] * 5
    assert bool((binarise(torch.full((2, 9), 0.25)) == 1).all())
    arguments = make(3, 2, 16, 9, 8, torch.float32)
    mask = lag_mask(**arguments)
    assert mask[:2].sum(1).tolist() == [8, 8]
    assert mask[2].sum() == 16


def test_the_mask_finds_where_the_picture_looks_at_the_word() -> None:
    arguments = make(1, 2, 16, 9, 8, torch.float32)
    arguments["q"] = arguments["q"] * 0.01
    arguments["q"][:, :, 4:8] += 5 * arguments["k"][:, :, :1]
    mask = lag_mask(**arguments)
    assert bool((mask[0, 4:8] == 1).all())


def interpreted(size: list[int], dtype: str, constants: dict[str, Any]) -> dict[str, float]:
    """Run both kernels; the median must be exact on the share that the first one gave."""
    torch.manual_seed(1)
    samples, heads, positions, keys, width = size
    arguments = make(samples, heads, positions, keys, width, getattr(torch, dtype))
    share = torch.full((samples, positions), float("nan"))
    config = LaunchConfig({"BLOCK_T": 32, "BLOCK_D": 16, **constants}, 4, 1, 1, "")
    share_launch(share, **arguments, config=config).run()
    if samples > 2:
        share[1] = 0.5
    mask = torch.full_like(share, float("nan"))
    median_launch(mask, share).run()
    want = exact_share(arguments)
    if samples > 2:
        want[1] = 0.5
    return {"error": relative_error(share, want), "mask": float(torch.equal(mask, binarise(share)))}


@pytest.mark.parametrize(
    ("size", "dtype", "constants"),
    [
        ([1, 1, 1, 1, 1], "float16", {}),
        ([3, 2, 7, 5, 3], "float32", {}),
        ([2, 2, 64, 77, 40], "float16", {"BLOCK_T": 64, "BLOCK_D": 32}),
        ([2, 1, 65, 100, 33], "float16", {}),
        ([0, 2, 8, 77, 8], "float16", {}),
        ([2, 2, 0, 77, 8], "float16", {}),
    ],
)
def test_kernels_interpreted(
    interpret: Callable[..., dict[str, float]], size: list[int], dtype: str, constants: dict[str, Any]
) -> None:
    found = interpret(__file__, "interpreted", size=size, dtype=dtype, constants=constants)
    assert found["error"] <= 2e-6
    assert found["mask"] == 1.0


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for number, config in enumerate(candidates(arch, "lag_mask")):
        # SD1.5's head widths; 40 is a multiple of 8 only.
        for width in (40, 160) if number == 0 else (40,):
            arguments = make(2, 8, 256, 77, width, torch.float16)
            found = cross_compile(share_launch(torch.zeros(2, 256), **arguments, config=config), arch)
            assert found.tensor_core == ("wgmma" if arch == "sm_90" else "mma")
    for positions in (64, 4096, 16384):
        share = torch.zeros(1, positions)
        cross_compile(median_launch(share, share), arch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "q has shape"),
        ({"q": torch.zeros(2, 3, 4, 8, dtype=torch.int32)}, "q is int32"),
        ({"q": torch.zeros(2, 3, 8, 4).transpose(2, 3)}, "q has strides"),
        ({"q": torch.zeros(2, 3, 16385, 8)}, "16385 positions"),
        ({"k": torch.zeros(2, 3, 5, 7)}, "k has shape"),
        ({"k": torch.zeros(2, 3, 5, 8, dtype=torch.float16)}, "k is float16"),
        ({"k": torch.zeros(2, 3, 257, 8), "chosen": torch.zeros(2, 257)}, "257 keys"),
        ({"chosen": torch.zeros(2, 6)}, "chosen has shape"),
        ({"chosen": torch.zeros(2, 5, dtype=torch.bool)}, "chosen is bool"),
        ({"chosen": torch.zeros(5, 2).t()}, "chosen has strides"),
        ({"k": torch.zeros(2, 3, 5, 8, device="meta")}, "k is on meta"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        lag_mask(**{**make(2, 3, 4, 5, 8, torch.float32), **change})


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (torch.zeros(4), "share has shape"),
        (torch.zeros(2, 4, dtype=torch.float16), "share is float16"),
        (torch.zeros(4, 2).t(), "share has strides"),
        (torch.zeros(1, 16385), "16385 positions"),
    ],
)
def test_wrong_shares_are_refused(share: Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        binarise(share)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 8, 4096, 77, 40), (2, 8, 64, 77, 160), (3, 5, 1023, 77, 64), (1, 1, 1, 1, 1)])
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, size: tuple[int, int, int, int, int]
) -> None:
    arguments = make(*size, dtype, "cuda")
    share = torch.empty(size[0], size[2], device=gpu)
    for config in candidates(architecture(gpu), "lag_mask"):
        check_on_gpu(
            reset=lambda: share.fill_(float("nan")),
            run=share_launch(share, **arguments, config=config).run,
            outputs=[share],
            expected=[exact_share(arguments)],
            tolerance=TOLERANCES[torch.float16],
        )
    mask = torch.empty_like(share)
    check_on_gpu(
        reset=lambda: mask.fill_(float("nan")),
        run=median_launch(mask, share).run,
        outputs=[mask],
        expected=[binarise(share.cpu()).to(gpu)],
        tolerance=0.0,
    )
