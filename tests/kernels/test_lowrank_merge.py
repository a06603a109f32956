"""lowrank_merge: reference against float64, kernel interpreted and cross-compiled, wrong arguments, GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, architecture, candidates
from hueshift.kernels.lowrank_merge import (
    LowRankFactors,
    MergeLayer,
    MergePlan,
    build_tables,
    launches,
    lowrank_merge,
    mix_adapters,
    mix_table,
    plan_merge,
    rank_vector,
    reference,
)
from hueshift.kernels.memory_format import columns_in_memory_order

SHAPES: list[tuple[tuple[int, ...], bool]] = [
    ((1, 1), False),
    ((31, 67), False),
    ((64, 64), False),
    ((8, 4, 3, 3), True),
    ((4, 8, 1, 1), False),
    ((65, 33), False),
]
RANKS = [1, 3, 16, 17, 31, 4, 64, 2]


def make_layers(
    dtype: torch.dtype, device: str = "cpu", shapes: list[tuple[tuple[int, ...], bool]] = SHAPES
) -> list[MergeLayer]:
    """Return layers with random bases and poisoned outputs."""
    layers = []
    for shape, last in shapes:
        base = (torch.randn(shape) * 0.05).to(device, dtype)
        if last:
            base = base.to(memory_format=torch.channels_last)
        layers.append(MergeLayer(base, torch.full_like(base, float("nan"))))
    return layers


def make_adapters(
    layers: list[MergeLayer], count: int, ranks: Sequence[int] = RANKS
) -> list[dict[int, LowRankFactors]]:
    """Return adapters of different ranks; each leaves out one layer."""
    adapters = []
    for number in range(count):
        adapter = {}
        for place, layer in enumerate(layers):
            if place != number:
                rank, like = ranks[number], layer.base
                a = torch.randn(rank, like[0].numel()).to(like.device, like.dtype) * 0.1
                b = torch.randn(like.shape[0], rank).to(like.device, like.dtype) * 0.1
                adapter[place] = LowRankFactors(a, b)
        adapters.append(adapter)
    return adapters


def exact(layers: list[MergeLayer], adapters: list[dict[int, LowRankFactors]], scales: Tensor) -> list[Tensor]:
    """Return every W' in float64."""
    found = []
    for place, layer in enumerate(layers):
        total = layer.base.double()
        for adapter, scale in zip(adapters, scales.double(), strict=True):
            if place in adapter:
                change = scale * (adapter[place].b.double() @ adapter[place].a.double())
                total = total + change.view(layer.base.shape)
        found.append(total)
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare 16-bit tensors bit for bit."""
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("count", [0, 1, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    layers = make_layers(dtype)
    adapters, scales = make_adapters(layers, count), torch.randn(count, dtype=torch.float64)
    plan = plan_merge(layers)
    lowrank_merge(plan, mix_adapters(plan, adapters), scales if dtype == torch.float64 else scales.float())
    for layer, want in zip(layers, exact(layers, adapters, scales), strict=True):
        assert relative_error(layer.out, want) <= TOLERANCES[dtype]


def test_scale_zero_gives_the_base_bit_for_bit() -> None:
    torch.manual_seed(0)
    layers = make_layers(torch.float16)
    layers[1].base[0, :9] = -0.0
    plan = plan_merge(layers)
    mix = mix_adapters(plan, make_adapters(layers, 2))
    lowrank_merge(plan, mix, torch.randn(2))
    assert not same_bits(layers[1].out, layers[1].base)
    lowrank_merge(plan, mix, torch.zeros(2))
    assert all(same_bits(layer.out, layer.base) for layer in layers)


def test_in_place_adds_on_top_of_what_is_there() -> None:
    torch.manual_seed(0)
    layers = make_layers(torch.float32)
    together = [MergeLayer(layer.base.clone(), layer.base) for layer in layers]
    shared = [MergeLayer(layer.base, layer.base) for layer in layers]
    want = exact(layers, adapters := make_adapters(layers, 1), torch.ones(1))
    plan = plan_merge(shared, in_place=True)
    lowrank_merge(plan, mix_adapters(plan, adapters), torch.ones(1))
    assert all(relative_error(layer.out, w) < 2e-6 for layer, w in zip(together, want, strict=True))


def gpu_style(layers: list[MergeLayer], adapters: list[dict[int, LowRankFactors]], vector: int) -> Tensor:
    """Return the mix table with factors in memory order; the factors stay alive in `adapters`."""
    for adapter in adapters:
        for place, factors in adapter.items():
            adapter[place] = LowRankFactors(columns_in_memory_order(factors.a, layers[place].out), factors.b)
    return mix_table(len(layers), adapters, vector)


def interpreted(dtype: str, count: int, constants: dict[str, Any]) -> dict[str, float]:
    """Run the kernel on every shape and return the largest error against the reference."""
    torch.manual_seed(count)
    layers = make_layers(getattr(torch, dtype))
    ranks = constants.pop("ranks", RANKS)
    adapters, scales = make_adapters(layers, count, ranks), torch.randn(count)
    want = exact(layers, adapters, scales)
    vector = rank_vector(adapters)
    table = gpu_style(layers, adapters, vector)
    config = LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_R": 16, "VECTOR": 4, **constants}, 4, 2, 1, "")
    for launch in launches(build_tables(layers, config), table, scales, vector):
        launch.run()
    return {
        "error": max(relative_error(layer.out, w) for layer, w in zip(layers, want, strict=True)),
        "same": float(all(torch.equal(layer.out, layer.base) for layer in layers)),
    }


@pytest.mark.parametrize(
    ("dtype", "count", "constants"),
    [
        ("float16", 1, {}),
        ("float16", 8, {"BLOCK_M": 64, "BLOCK_N": 64}),
        ("float32", 2, {"VECTOR": 8, "BLOCK_R": 32}),
        ("float16", 3, {"ranks": [8, 32, 16]}),
        ("float16", 0, {}),
    ],
)
def test_kernel_interpreted(
    interpret: Callable[..., dict[str, float]], dtype: str, count: int, constants: dict[str, Any]
) -> None:
    found = interpret(__file__, "interpreted", dtype=dtype, count=count, constants=constants)
    assert found["error"] <= TOLERANCES[getattr(torch, dtype)]
    assert bool(found["same"]) is (count == 0)


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for number, config in enumerate(candidates(arch, "lowrank_merge")):
        layers = make_layers(torch.float16, shapes=[((8, 16), False)])
        for count in (1, 8) if number == 0 else (1,):
            table = torch.zeros(1, count, 4, dtype=torch.int64)
            for vector in (1, 8) if number == 0 else (8,):
                (launch,) = launches(build_tables(layers, config), table, torch.zeros(count), vector)
                found = cross_compile(launch, arch)
                assert found.tensor_core != "none"
                assert set(found.accesses("st")) == {16}


def small_plan() -> MergePlan:
    """Return a plan of one layer on the CPU."""
    return plan_merge([MergeLayer(torch.zeros(5, 8), torch.zeros(5, 8))])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 7), torch.zeros(5, 2), "a has shape"),
        (torch.zeros(2, 8), torch.zeros(5, 3), "b has shape"),
        (torch.zeros(0, 8), torch.zeros(5, 0), "rank 0"),
        (torch.zeros(2, 8, dtype=torch.float16), torch.zeros(5, 2), "a is float16"),
        (torch.zeros(8, 2).t(), torch.zeros(5, 2), "a has strides"),
        (torch.zeros(2, 8), torch.zeros(11)[1:].view(5, 2), "16-byte boundary"),
        (torch.zeros(2, 8, device="meta"), torch.zeros(5, 2), "a is on meta"),
    ],
)
def test_wrong_factors_are_refused(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        mix_adapters(small_plan(), [{0: LowRankFactors(a, b)}])


def test_wrong_plans_mixes_and_scales_are_refused() -> None:
    plan = small_plan()
    factors = LowRankFactors(torch.zeros(2, 8), torch.zeros(5, 2))
    base = torch.zeros(5, 8)
    for layers, message in (
        ([], "empty"),
        ([MergeLayer(base, base)], "overlap"),
        ([MergeLayer(base, torch.zeros(5, 9))], "out has shape"),
        ([MergeLayer(base, torch.zeros(5, 8, dtype=torch.float16))], "out is float16"),
        ([MergeLayer(torch.zeros(3), torch.zeros(3))], "1 dimensions"),
    ):
        with pytest.raises(KernelArgumentError, match=message):
            plan_merge(layers)
    shared = torch.zeros(16, 8)
    for first, second in ((base, base), (shared[:8], shared[4:12])):
        layers = [MergeLayer(torch.zeros_like(out), out) for out in (first, second)]
        with pytest.raises(KernelArgumentError, match=r"layers\[0\]\.out and layers\[1\]\.out overlap"):
            plan_merge(layers)
    with pytest.raises(KernelArgumentError, match="9 adapters"):
        mix_adapters(plan, [{}] * 9)
    with pytest.raises(KernelArgumentError, match="names layer 1"):
        mix_adapters(plan, [{1: factors}])
    mix = mix_adapters(plan, [{0: factors}])
    with pytest.raises(KernelArgumentError, match="scales has shape"):
        lowrank_merge(plan, mix, torch.ones(2))
    with pytest.raises(KernelArgumentError, match="scales is float16"):
        lowrank_merge(plan, mix, torch.ones(1, dtype=torch.float16))


GPU_SHAPES = [*SHAPES, ((1280, 1280), False), ((320, 768), False), ((640, 320, 3, 3), True)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 8])
def test_every_configuration_on_a_gpu(
    gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype, count: int
) -> None:
    for config in candidates(architecture(gpu), "lowrank_merge"):
        layers = make_layers(dtype, "cuda", GPU_SHAPES)
        adapters, scales = make_adapters(layers, count), torch.randn(count, device=gpu)
        plan = plan_merge(layers, config=config)
        mix = mix_adapters(plan, adapters)

        def reset(chosen: list[MergeLayer] = layers) -> None:
            for layer in chosen:
                layer.out.fill_(float("nan"))

        check_on_gpu(
            reset=reset,
            run=lambda p=plan, m=mix, s=scales: lowrank_merge(p, m, s),
            outputs=[layer.out for layer in layers],
            expected=exact(layers, adapters, scales),
            tolerance=TOLERANCES[dtype],
        )


@pytest.mark.gpu
def test_a_thousand_merges_then_the_base_bit_for_bit(gpu: torch.device) -> None:
    layers = make_layers(torch.float16, "cuda", GPU_SHAPES)
    pristine = [layer.base.clone() for layer in layers]
    plan = plan_merge(layers)
    mixes = [mix_adapters(plan, make_adapters(layers, count)) for count in (1, 2, 5)]
    for step in range(1000):
        mix = mixes[step % 3]
        lowrank_merge(plan, mix, torch.randn(len(mix.adapters), device=gpu))
    lowrank_merge(plan, mix_adapters(plan, []), torch.zeros(0, device=gpu))
    for layer, base in zip(layers, pristine, strict=True):
        assert same_bits(layer.out, base)


@pytest.mark.gpu
def test_gpu_reference_is_the_cpu_reference(gpu: torch.device) -> None:
    layers = make_layers(torch.float16, "cuda")
    adapters = make_adapters(layers, 2)
    scales = torch.randn(2, device=gpu)
    reference(layers, adapters, scales)
    for layer, want in zip(layers, exact(layers, adapters, scales), strict=True):
        assert relative_error(layer.out, want) <= TOLERANCES[torch.float16]
