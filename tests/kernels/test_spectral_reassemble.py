"""spectral_reassemble: reference against float64, kernels interpreted and cross-compiled, wrong arguments, GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, candidates
from hueshift.kernels.spectral_plan import SpectralLayer, SpectralPlan, build_tables, plan_spectral, share_plan
from hueshift.kernels.spectral_reassemble import launches, reference, spectral_reassemble

# Primes, 1, sizes around powers of two, conv_in's 36 columns and conv_out's 4 rows; True = channels_last.
SHAPES: list[tuple[tuple[int, ...], bool]] = [
    ((1, 1), False),
    ((37, 1), False),
    ((1, 53), False),
    ((63, 65), False),
    ((64, 4, 3, 3), True),
    ((4, 32, 3, 3), False),
    ((4, 32, 3, 3), True),
    ((31, 33, 1, 1), False),
    ((40, 72), False),
]
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "DIRECT": False, "VECTOR": 4}


def make_layers(
    shapes: list[tuple[tuple[int, ...], bool]], dtype: torch.dtype, device: str = "cpu", first: int = 3
) -> tuple[list[SpectralLayer], int]:
    """Decompose random weights; `first` values of a row belong to nobody, and outputs are poisoned."""
    layers: list[SpectralLayer] = []
    offset = first
    for shape, last in shapes:
        weight = (torch.randn(shape, dtype=torch.float64) * 0.05).to(dtype)
        if last:
            weight = weight.to(memory_format=torch.channels_last)
        u, sigma, vh = torch.linalg.svd(weight.double().reshape(shape[0], -1), full_matrices=False)
        sigma_type = torch.float64 if dtype == torch.float64 else torch.float32
        layers.append(
            SpectralLayer(
                u=u.to(device, dtype).contiguous(),
                sigma=sigma.to(device, sigma_type),
                vh=vh.to(device, dtype).contiguous(),
                base=weight.to(device),
                out=torch.full_like(weight, float("nan")).to(device),
                offset=offset,
            )
        )
        offset += len(sigma)
    return layers, offset


def exact(layer: SpectralLayer, rows: Tensor, weights: Tensor) -> Tensor:
    """Return W' in float64 by the direct form with the layer's own factors, element by element where it is cheap."""
    part = rows[:, layer.offset : layer.offset + layer.rank].double()
    sigma = layer.sigma.double()
    shift = (sigma + (weights.double()[:, None] * part).sum(0)).clamp(min=0) - sigma
    change = torch.einsum("mr,r,rn->mn", layer.u.double(), shift, layer.vh.double())
    return layer.base.double() + change.reshape(layer.base.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit, so that -0.0 differs from 0.0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def small_plan(dtype: torch.dtype = torch.float32) -> tuple[SpectralPlan, Tensor, Tensor]:
    """Return a plan of two layers on the CPU with a fitting row and weight."""
    torch.manual_seed(0)
    layers, size = make_layers([((5, 7), False), ((4, 2, 3, 3), True)], dtype)
    return plan_spectral(layers), torch.randn(1, size), torch.ones(1)


@pytest.mark.parametrize("adapters", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_agrees_with_float64(dtype: torch.dtype, adapters: int) -> None:
    torch.manual_seed(adapters)
    layers, size = make_layers(SHAPES, dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    rows, weights = torch.randn(adapters, size, dtype=kind) * 0.2, torch.rand(adapters, dtype=kind)
    spectral_reassemble(plan_spectral(layers), rows, weights)
    for layer in layers:
        assert relative_error(layer.out, exact(layer, rows, weights)) <= TOLERANCES[dtype]
        assert layer.out.stride() == layer.base.stride()


def test_truncated_decompositions_and_rank_one() -> None:
    torch.manual_seed(0)
    full, size = make_layers([((9, 13), False)], torch.float32)
    for rank in (1, 4, 9):
        cut = full[0]
        layer = SpectralLayer(
            cut.u[:, :rank].contiguous(), cut.sigma[:rank], cut.vh[:rank], cut.base, torch.empty_like(cut.base), 3
        )
        rows = torch.randn(1, size)
        spectral_reassemble(plan_spectral([layer]), rows, torch.ones(1))
        assert relative_error(layer.out, exact(layer, rows, torch.ones(1))) < 1e-6


def test_no_shift_gives_the_base_bit_for_bit_negative_zeros_included() -> None:
    torch.manual_seed(0)
    layers, size = make_layers(SHAPES, torch.float16)
    layers[3].base[0, :8] = -0.0
    plan = plan_spectral(layers)
    for rows, weights in ((torch.zeros(1, size), torch.ones(1)), (torch.zeros(0, size), torch.zeros(0))):
        spectral_reassemble(plan, rows, weights)
        assert all(same_bits(layer.out, layer.base) for layer in layers)


def test_relu_clamps_and_composition_is_the_weighted_sum() -> None:
    plan, row, _ = small_plan()
    spectral_reassemble(plan, torch.full_like(row, -1e3), torch.ones(1))
    assert all(float(layer.out.abs().max()) < 1e-6 for layer in plan.layers)
    other = torch.randn_like(row)
    spectral_reassemble(plan, torch.cat([row, other]), torch.tensor([0.25, 0.75]))
    composed = [layer.out.clone() for layer in plan.layers]
    spectral_reassemble(plan, 0.25 * row + 0.75 * other, torch.ones(1))
    for layer, want in zip(plan.layers, composed, strict=True):
        assert relative_error(layer.out, want) < 1e-6


def test_effective_values_are_the_same_adapter() -> None:
    plan, row, weights = small_plan()
    spectral_reassemble(plan, row, weights)
    composed = [layer.out.clone() for layer in plan.layers]
    values = row.clone()
    for layer in plan.layers:
        part = slice(layer.offset, layer.offset + layer.rank)
        values[0, part] = (layer.sigma + row[0, part]).clamp(min=0)
    spectral_reassemble(plan, values, weights, effective=True)
    for layer, want in zip(plan.layers, composed, strict=True):
        assert relative_error(layer.out, want) < 1e-6


def interpreted(dtype: str, adapters: int, effective: bool, zero: bool, constants: dict[str, Any]) -> dict[str, float]:
    """Run the kernels on every shape and return the largest error, and whether all bits are the base's."""
    torch.manual_seed(1)
    layers, size = make_layers(SHAPES, getattr(torch, dtype))
    layers[3].base[0, :8] = -0.0
    rows, weights = torch.randn(adapters, size) * (0.0 if zero else 0.2), torch.rand(adapters)
    if effective:
        weights = torch.ones(1)
        for layer in layers:
            part = slice(layer.offset, layer.offset + layer.rank)
            rows[0, part] = (layer.sigma + rows[0, part]).clamp(min=0)
    config = LaunchConfig({**SMALL, **constants}, 4, 2, 1, "")
    for launch in launches(build_tables(layers, size, config), rows, weights, effective=effective):
        launch.run()
    got = [layer.out.clone() for layer in layers]
    reference(tuple(layers), rows, weights, effective=effective)
    return {
        "error": max(relative_error(out, layer.out) for out, layer in zip(got, layers, strict=True)),
        "same": float(all(same_bits(out, layer.base) for out, layer in zip(got, layers, strict=True))),
    }


@pytest.mark.parametrize(
    ("adapters", "effective", "zero", "constants"),
    [
        (1, False, False, {"TMA": True}),
        (2, False, False, {"TMA": True, "BLOCK_N": 64}),
        (1, True, False, {"TMA": False, "BLOCK_N": 64}),
        (3, False, False, {"TMA": False, "BLOCK_M": 64, "VECTOR": 8, "BLOCK_K": 64}),
        (1, False, True, {"TMA": True}),
        (0, False, True, {"TMA": False}),
        # Straight from the tensor cores' layout; layers whose columns are no multiple of 8 are put into order first.
        (2, False, False, {"TMA": True, "DIRECT": True, "VECTOR": 8}),
        (1, True, False, {"TMA": False, "DIRECT": True, "VECTOR": 8, "BLOCK_N": 64}),
        (1, False, True, {"TMA": True, "DIRECT": True, "VECTOR": 8}),
    ],
)
def test_kernels_interpreted(
    interpret: Callable[..., dict[str, float]], adapters: int, effective: bool, zero: bool, constants: dict[str, Any]
) -> None:
    for dtype in ("float16", "float32") if constants["TMA"] else ("float16",):
        found = interpret(
            __file__, "interpreted", dtype=dtype, adapters=adapters, effective=effective, zero=zero, constants=constants
        )
        assert found["error"] <= TOLERANCES[getattr(torch, dtype)]
        assert bool(found["same"]) is zero


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_configuration_compiles(cross_compile: Callable[..., Any], arch: str) -> None:
    for number, config in enumerate(candidates(arch, "spectral_reassemble")):
        # What depends on the arguments alone is compiled once, for the newest architecture.
        thorough = arch == "sm_90" and number == 0
        for dtype in (torch.float16, torch.bfloat16) if thorough else (torch.float16,):
            layers, size = make_layers([((8, 16), False)], dtype)
            tables = build_tables(layers, size, config)
            for adapters, effective in ((1, False), (3, False), (1, True)) if thorough else ((1, False),):
                rows, weights = torch.zeros(adapters, size), torch.zeros(adapters)
                wanted = launches(tables, rows, weights, effective=effective)
                assert len(wanted) == 2
                found = [cross_compile(launch, arch) for launch in wanted][-1]
                assert found.tensor_core == ("wgmma" if arch == "sm_90" else "mma")
                # Every stage is in use, across tiles too.
                assert found.tma_copies == (2 * config.num_stages if config["TMA"] else 0)
                # Weights are written several elements at a time.
                assert set(found.accesses("st")) == {2 * config["VECTOR"]}
                if config["DIRECT"]:
                    # A tile is read and written once, 16 bytes a thread, and never lies in shared memory.
                    pieces = config["BLOCK_M"] * config["BLOCK_N"] // 8 // (32 * config.num_warps)
                    assert (found.accesses("ld")[16], found.accesses("st")[16]) == (pieces, pieces)
                    assert "st.shared" not in found.ptx
                    assert "ld.shared" not in found.ptx


def test_odd_columns_compile(cross_compile: Callable[..., Any]) -> None:
    layers, size = make_layers([((8, 16), False), ((8, 36), False), ((8, 17), False)], torch.float16)
    tables = build_tables(layers, size, candidates("sm_90", "spectral_reassemble")[0])
    found = launches(tables, torch.zeros(1, size), torch.zeros(1), effective=False)
    assert [launch.constants.get("VECTOR") for launch in found] == [None, 8, 4, 1]
    # conv_in's 36 columns: a launch of its own.
    cross_compile(found[-2], "sm_90")
    # Element by element, it spills a little; no real model has such a layer.
    cross_compile(found[-1], "sm_90", spills_allowed=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": torch.ones(5, dtype=torch.float16)}, "sigma is float16"),
        ({"sigma": torch.ones(6)}, "sigma has 6 values"),
        ({"u": torch.ones(5, 4)}, "u has shape"),
        ({"vh": torch.ones(7, 5)}, "vh has shape"),
        ({"u": torch.ones(5, 5, dtype=torch.float64)}, "u is float64"),
        ({"out": torch.ones(5, 8)}, "out has shape"),
        ({"out": torch.ones(7, 5).t()}, "out has strides"),
        ({"out": torch.ones(36)[1:].view(5, 7)}, "16-byte boundary"),
        ({"base": torch.ones(5, 7, 1), "out": torch.ones(5, 7, 1)}, "3 dimensions"),
        ({"offset": -1}, "offset is -1"),
        ({"u": torch.ones(5, 5, device="meta")}, "u is on meta"),
    ],
)
def test_wrong_layers_are_refused(change: dict[str, Any], message: str) -> None:
    plan, _, _ = small_plan()
    fields = {name: getattr(plan.layers[0], name) for name in ("u", "sigma", "vh", "base", "out", "offset")}
    with pytest.raises(KernelArgumentError, match=message):
        plan_spectral([SpectralLayer(**{**fields, **change})])


def test_formats_that_differ_and_memory_that_overlaps_are_refused() -> None:
    plan, _, _ = small_plan()
    matrix, conv = plan.layers
    with pytest.raises(KernelArgumentError, match="memory formats"):
        plan_spectral([SpectralLayer(conv.u, conv.sigma, conv.vh, conv.base.contiguous(), conv.out, 0)])
    with pytest.raises(KernelArgumentError, match="overlap"):
        plan_spectral([SpectralLayer(matrix.u, matrix.sigma, matrix.vh, matrix.base, matrix.base, 0)])
    with pytest.raises(KernelArgumentError, match="empty"):
        plan_spectral([])
    # Of two layers that are written to one place, chance would choose which stays.
    with pytest.raises(KernelArgumentError, match=r"layers\[0\].out and layers\[1\].out overlap"):
        plan_spectral([matrix, replace(matrix, base=matrix.base.clone())])
    # Two layers may read one base, but none may write what another reads.
    twice = plan_spectral([matrix, replace(matrix, out=torch.empty_like(matrix.out))])
    with pytest.raises(KernelArgumentError, match=r"layers\[1\].out and layers\[0\].base overlap"):
        plan_spectral([matrix, replace(matrix, base=matrix.out.clone(), out=matrix.base)])
    with pytest.raises(KernelArgumentError, match="overlap"):
        share_plan(twice, [matrix.out, matrix.out])


@pytest.mark.parametrize(
    ("rows", "weights", "effective", "message"),
    [
        (torch.zeros(1, 12, dtype=torch.float16), torch.ones(1), False, "rows is float16"),
        (torch.zeros(12), torch.ones(1), False, "rows has shape"),
        (torch.zeros(1, 3), torch.ones(1), False, "3 values long"),
        (torch.zeros(9, 12), torch.ones(9), False, "9 adapters"),
        (torch.zeros(2, 12), torch.ones(2), True, "2 adapters"),
        (torch.zeros(1, 12), torch.ones(2), False, "weights has shape"),
        (torch.zeros(1, 12), torch.ones(1, dtype=torch.float64), False, "weights is float64"),
        (torch.zeros(12, 2).t(), torch.ones(2), False, "rows has strides"),
        (torch.zeros(1, 12, device="meta"), torch.ones(1), False, "rows is on meta"),
    ],
)
def test_wrong_rows_are_refused(rows: Tensor, weights: Tensor, effective: bool, message: str) -> None:
    plan, _, _ = small_plan()
    with pytest.raises(KernelArgumentError, match=message):
        spectral_reassemble(plan, rows, weights, effective=effective)


GPU_SHAPES = [*SHAPES, ((320, 4, 3, 3), True), ((640, 320), False), ((1280, 640, 3, 3), True), ((1280, 5120), False)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_configuration_on_a_gpu(gpu: torch.device, check_on_gpu: Callable[..., None], dtype: torch.dtype) -> None:
    from hueshift.kernels.launch_table import architecture

    for config in candidates(architecture(gpu), "spectral_reassemble"):
        layers, size = make_layers(GPU_SHAPES, dtype, "cuda")
        plan = plan_spectral(layers, config=config)
        rows, weights = torch.randn(2, size, device=gpu) * 0.2, torch.tensor([0.7, 0.3], device=gpu)

        def reset(chosen: list[SpectralLayer] = layers) -> None:
            for layer in chosen:
                layer.out.fill_(float("nan"))

        check_on_gpu(
            reset=reset,
            run=lambda chosen=plan, r=rows, w=weights: spectral_reassemble(chosen, r, w),
            outputs=[layer.out for layer in layers],
            expected=[exact(layer, rows, weights) for layer in layers],
            # Scaled factors are rounded once more: 8.9e-4 was seen in fp16 on an H200.
            tolerance=1.5 * TOLERANCES[dtype],
        )


@pytest.mark.gpu
def test_a_thousand_swaps_then_the_base_bit_for_bit(gpu: torch.device) -> None:
    layers, size = make_layers(GPU_SHAPES, torch.float16, "cuda")
    pristine = [layer.base.clone() for layer in layers]
    plan = plan_spectral(layers)
    for _ in range(1000):
        count = int(torch.randint(0, 4, ()))
        rows = torch.randn(count, size, device=gpu)
        spectral_reassemble(plan, rows, torch.rand(count, device=gpu))
    spectral_reassemble(plan, torch.zeros(1, size, device=gpu), torch.ones(1, device=gpu))
    for layer, base in zip(layers, pristine, strict=True):
        assert same_bits(layer.out, base)
        assert same_bits(layer.base, base)


@pytest.mark.gpu
def test_a_captured_graph_sees_rows_changed_in_place(gpu: torch.device) -> None:
    layers, size = make_layers(GPU_SHAPES, torch.float16, "cuda")
    plan = plan_spectral(layers)
    rows, weights = torch.zeros(1, size, device=gpu), torch.ones(1, device=gpu)
    spectral_reassemble(plan, rows, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spectral_reassemble(plan, rows, weights)
    for _ in range(20):
        rows.copy_(torch.randn(1, size, device=gpu))
        graph.replay()
        replayed = [layer.out.clone() for layer in layers]
        spectral_reassemble(plan, rows, weights)
        assert all(torch.equal(layer.out, want) for layer, want in zip(layers, replayed, strict=True))
