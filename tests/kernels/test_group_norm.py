"""group_norm: reference against float64, interpreted and compiled kernels, wrong arguments, GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels import group_norm as module
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.group_norm import CLASSES, group_norm, launches, reference, shape_class
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates

Arguments = dict[str, Any]
EPS = 1e-5


def make(
    samples: int, channels: int, height: int, width: int, dtype: torch.dtype, *, rows: bool, shifts: bool = True
) -> Arguments:
    """Return arguments of one call; pictures are far from zero beside how much they vary."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(samples, channels, height, width) + 2.0).to(dtype)
    slab = torch.rand(5, channels + 7, dtype=wide) + 0.5
    return {
        "x": x.contiguous(memory_format=torch.channels_last),
        "weight": slab[:, 3 : 3 + channels] if rows else (torch.rand(channels) + 0.5).to(dtype),
        "bias": torch.randn(channels).to(dtype),
        "index": torch.arange(samples) % 5 if rows else None,
        "shift": torch.randn(samples, channels).to(dtype) if shifts else None,
        "shift_bias": torch.randn(channels).to(dtype) if shifts else None,
    }


def exact(arguments: Arguments, groups: int, *, silu: bool) -> Tensor:
    """Return the result in float64, sample by sample, by torch's norm with weights."""
    found = []
    for n, picture in enumerate(arguments["x"].double()):
        for part in (arguments["shift"][n] if arguments["shift"] is not None else None, arguments["shift_bias"]):
            picture = picture if part is None else picture + part.double()[:, None, None]
        weight = arguments["weight"]
        weight = weight if arguments["index"] is None else weight[arguments["index"][n]]
        normal = torch.group_norm(picture[None], groups, weight.double(), arguments["bias"].double(), EPS)
        found.append(functional.silu(normal) if silu else normal)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("size", "groups"), [((2, 1, 1, 3), 1), ((3, 6, 5, 7), 3), ((1, 32, 4, 4), 32), ((4, 40, 3, 1), 4)]
)
@pytest.mark.parametrize("rows", [False, True])
def test_reference_agrees_with_each_samples_own_norm(
    dtype: torch.dtype, size: tuple[int, int, int, int], groups: int, rows: bool
) -> None:
    torch.manual_seed(0)
    for silu, shifts in ((False, True), (True, False), (True, True)):
        arguments = make(*size, dtype, rows=rows, shifts=shifts)
        y = group_norm(groups=groups, eps=EPS, silu=silu, **arguments)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == dtype
        assert relative_error(y, exact(arguments, groups, silu=silu)) <= TOLERANCES[dtype]


def test_an_empty_batch_gives_an_empty_batch() -> None:
    assert group_norm(groups=2, eps=EPS, **make(0, 4, 3, 3, torch.float32, rows=True)).shape == (0, 4, 3, 3)


def test_samples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    arguments = make(3, 8, 4, 4, torch.float32, rows=True)
    before = group_norm(groups=4, eps=EPS, **arguments)
    arguments["x"][1] = float("nan")
    after = group_norm(groups=4, eps=EPS, **arguments)
    assert torch.equal(before[[0, 2]], after[[0, 2]])


def interpreted(
    size: list[int], dtype: str, groups: int, rows: bool, shifts: bool, silu: bool, constants: dict[str, Any]
) -> dict[str, float]:
    """Run the launches; return the error, and whether a wrong index gave NaN there alone."""
    torch.manual_seed(1)
    samples, channels, height, width = size
    arguments = make(samples, channels, height, width, getattr(torch, dtype), rows=rows, shifts=shifts)
    want = exact(arguments, groups, silu=silu) if samples else arguments["x"]
    y = torch.full_like(arguments["x"], float("nan"))
    config = LaunchConfig(constants, 4, 2, 1, "")

    def run() -> None:
        for launch in launches(y, groups=groups, eps=EPS, silu=silu, config=config, **arguments):
            launch.run()

    run()
    error = relative_error(y, want) if samples else 0.0
    if not rows or not samples:
        return {"error": error, "nan": 1.0}
    arguments["index"][-1] = 5
    run()
    return {"error": error, "nan": float(bool(y[-1].isnan().all()) and not bool(y[:-1].isnan().any()))}


@pytest.mark.parametrize(
    ("size", "dtype", "groups", "rows", "shifts", "silu", "constants"),
    [
        ([1, 1, 1, 1], "float16", 1, False, False, False, {"BLOCK_P": 16}),
        ([2, 12, 5, 7], "float16", 4, True, True, True, {"BLOCK_P": 16}),
        ([2, 40, 4, 4], "float32", 4, True, False, False, {"BLOCK_P": 32}),
        ([0, 8, 4, 4], "float16", 4, True, True, True, {"BLOCK_P": 16}),
        ([1, 1, 1, 1], "float16", 1, False, False, False, {"BLOCK_P": 16, "BLOCK_C": 16, "CHUNK": 16}),
        ([2, 12, 5, 7], "float16", 4, True, True, True, {"BLOCK_P": 8, "BLOCK_C": 16, "CHUNK": 16}),
        ([3, 40, 9, 9], "float32", 4, False, True, False, {"BLOCK_P": 16, "BLOCK_C": 32, "CHUNK": 32}),
        ([2, 30, 6, 11], "float16", 3, True, False, True, {"BLOCK_P": 16, "BLOCK_C": 16, "CHUNK": 64}),
        ([0, 8, 4, 4], "float16", 4, False, True, True, {"BLOCK_P": 16, "BLOCK_C": 16, "CHUNK": 16}),
        # More pixels than the most chunks hold: chunks of 32.
        ([1, 4, 97, 96], "float16", 2, False, True, True, {"BLOCK_P": 32, "BLOCK_C": 16, "CHUNK": 16}),
    ],
)
def test_kernels_interpreted(
    interpret: Callable[..., dict[str, float]],
    size: list[int],
    dtype: str,
    groups: int,
    rows: bool,
    shifts: bool,
    silu: bool,
    constants: dict[str, Any],
) -> None:
    found = interpret(
        __file__,
        "interpreted",
        size=size,
        dtype=dtype,
        groups=groups,
        rows=rows,
        shifts=shifts,
        silu=silu,
        constants=constants,
    )
    assert found["error"] <= TOLERANCES[getattr(torch, dtype)]
    assert found["nan"] == 1.0


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    # A few pixels of 1280 channels: groups of 40, five vectors of eight. Many pixels: all channels side by side. Then
    # an autoencoder's largest pictures, compiled for the first choice alone.
    shapes: list[tuple[int, ...]] = [(2, 1280, 8, 8), (2, 320, 64, 64), (1, 128, 1024, 1024), (1, 512, 256, 256)]
    for shape in shapes:
        x = torch.empty(shape, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        channels = shape[1]
        bias, slab = torch.zeros(channels, dtype=torch.float16), torch.zeros(3, channels)
        index, shift = torch.zeros(2, dtype=torch.int64), torch.zeros(2, channels, dtype=torch.float16)
        configs = candidates(arch, "group_norm", shape_class(shape[2] * shape[3]))
        for config in configs[:1] if shape[0] == 1 else configs:
            given = (torch.empty_like(x), x, slab, bias, 32, EPS, index, shift, bias)
            found = [cross_compile(launch, arch) for launch in launches(*given, silu=True, config=config)]
            # The picture is written eight elements at a time.
            assert set(found[-1].accesses("st")) == {16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 3)}, "x has shape"),
        ({"x": torch.zeros(2, 6, 3, 3)}, "needed: channels_last"),
        ({"groups": 4}, "4 groups of 6 channels"),
        ({"groups": 0}, "0 groups of 6 channels"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, "bias is float64"),
        ({"shift": torch.zeros(6)}, "shift has shape"),
        ({"shift": torch.zeros(6, 2).t()}, "shift has strides"),
        ({"shift_bias": torch.zeros(6, device="meta")}, "shift_bias is on meta"),
        ({"weight": torch.zeros(6)}, "weight has shape"),
        ({"weight": torch.zeros(5, 6, dtype=torch.float16)}, "weight is float16"),
        ({"weight": torch.zeros(6, 5).t()}, "weight has strides"),
        ({"index": None}, "weight has shape"),
        ({"index": torch.tensor([0, 5])}, "values 0..5"),
        ({"index": torch.tensor([0])}, "index has shape"),
        ({"index": torch.tensor([0, 9, 1, 9])[::2]}, "index has strides"),
    ],
)
def test_wrong_arguments_are_refused(change: Arguments, message: str) -> None:
    arguments = {"groups": 3, "eps": EPS, **make(2, 6, 3, 3, torch.float32, rows=True), **change}
    with pytest.raises(KernelArgumentError, match=message):
        group_norm(**arguments)


def test_pictures_without_pixels_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpu", lambda _: True)
    for shape in ((0, 6, 2, 2), (2, 6, 0, 3)):
        y = group_norm(torch.zeros(shape), torch.ones(6), torch.zeros(6), 3, EPS, silu=True)
        assert y.shape == shape


def test_a_picture_that_32_bits_do_not_address_is_refused() -> None:
    side = 1 << 14
    # No memory is behind it.
    x = torch.empty(1, 8, side, side, device="meta").contiguous(memory_format=torch.channels_last)
    assert x.numel() == 1 << 31
    with pytest.raises(KernelArgumentError, match="2147483648 elements a sample"):
        group_norm(x, torch.ones(8, device="meta"), torch.ones(8, device="meta"), 4, EPS)


def run_launches(y: Tensor, arguments: Arguments, groups: int, *, silu: bool, config: LaunchConfig) -> None:
    """Run one configuration."""
    for launch in launches(y, groups=groups, eps=EPS, silu=silu, config=config, **arguments):
        launch.run()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chosen", CLASSES)
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, chosen: str
) -> None:
    sides = {"few_pixels": (16, 7), "many_pixels": (64, 33)}[chosen]
    for config in candidates(architecture(gpu), "group_norm", chosen):
        for channels, side, rows, silu in ((320, sides[0], True, True), (1920, sides[1], False, False)):
            given = make(3, channels, side, side + 1, dtype, rows=rows)
            arguments: Arguments = {name: part if part is None else part.to(gpu) for name, part in given.items()}
            wide: Arguments = {n: p.double() if p is not None and n != "index" else p for n, p in arguments.items()}
            y = torch.empty_like(arguments["x"])
            check_on_gpu(
                reset=lambda to=y: to.fill_(float("nan")),
                run=partial(run_launches, y, arguments, 32, silu=silu, config=config),
                outputs=[y],
                expected=[reference(groups=32, eps=EPS, silu=silu, **wide)],
                tolerance=TOLERANCES[dtype],
            )
