"""Merge low-rank adapters into weights, W' = W + sum_k s_k B_k A_k (LoRA, Hu et al. 2021), many layers in one launch.

Bound by memory: W is read and W' written once, whatever the number of adapters, so one launch for all layers matters
(128 launches of 4 us would take 0.5 ms where SD1.5's attention weights need 0.09). Always from the pristine base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

from hueshift.kernels.checks import (
    HALF_TYPES,
    MAX_ELEMENTS,
    REFERENCE_TYPES,
    check_aligned,
    check_all_apart,
    check_apart,
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
)
from hueshift.kernels.device import read_once, read_tile, write_sum
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, jit, multiprocessors, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.memory_format import check_format, columns_in_memory_order
from hueshift.kernels.tiles import MatrixShape, order_tiles

MAX_ADAPTERS = 8


@dataclass(frozen=True, slots=True)
class MergeLayer:
    """One weight: `base` is read, `out` written. Both [m, n] or [m, c_in, kh, kw], of one dtype and memory format."""

    base: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """One adapter's change B A of one layer: a [r, n] (n over c_in, kh, kw) and b [m, r], of the weight's dtype."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class MergeTables:
    """What the kernel reads beside the mix.

    groups: tiles [T, 4] int32 (layer, tile row, tile column, 0) with the vector width their columns are a multiple of.
    layers [L, 4] int64: addresses of base and out, rows, columns in vectors.
    `first` is any of the weights: it tells the kernel the element type behind the addresses.
    """

    first: Tensor
    groups: tuple[tuple[Tensor, int], ...]
    layers: Tensor
    config: LaunchConfig


@dataclass(frozen=True)
class MergePlan:
    """Layers that are merged together. It keeps the tensors alive whose addresses the tables hold."""

    layers: tuple[MergeLayer, ...]
    device: torch.device
    tables: MergeTables | None


@dataclass(frozen=True)
class LowRankMix:
    """The adapters of one merge.

    `table` [L, K, 4] int64: addresses of a and b, rank in units of `rank_vector` (0 = none), 0; None on a CPU.
    """

    adapters: tuple[Mapping[int, LowRankFactors], ...]
    table: Tensor | None
    rank_vector: int = 1


def plan_merge(
    layers: Sequence[MergeLayer], *, in_place: bool = False, config: LaunchConfig | None = None
) -> MergePlan:
    """Build the plan of these layers, once per model; `config` replaces the launch table's choice.

    `in_place` allows base and out to be the same tensor: for adding low-rank parts to weights that a spectral
    reassembly has just rebuilt from the pristine base. Raises KernelArgumentError on what does not fit.
    """
    if not layers:
        raise KernelArgumentError("layers is empty (needed: at least one)")
    device = layers[0].base.device
    for number, layer in enumerate(layers):
        check_layer(f"layers[{number}]", layer, device, layers[0].base.dtype, in_place)
    # One launch writes them all, in no order.
    check_all_apart([(f"layers[{number}].out", layer.out) for number, layer in enumerate(layers)])
    tables = build_tables(layers, config or choose(device, "lowrank_merge")) if device.type == "cuda" else None
    return MergePlan(tuple(layers), device, tables)


def check_layer(name: str, layer: MergeLayer, device: torch.device, dtype: torch.dtype, in_place: bool) -> None:
    """Raise KernelArgumentError if one layer's tensors do not fit each other or the kernel."""
    check_dtype(f"{name}.base", layer.base, HALF_TYPES if device.type == "cuda" else REFERENCE_TYPES)
    check_shape(f"{name}.out", layer.out, tuple(layer.base.shape))
    for part, tensor in (("base", layer.base), ("out", layer.out)):
        check_dtype(f"{name}.{part}", tensor, (dtype,))
        check_device(f"{name}.{part}", tensor, device)
        check_aligned(f"{name}.{part}", tensor)
    check_format(name, layer.base, layer.out)
    if layer.base.numel() > MAX_ELEMENTS:
        raise KernelArgumentError(f"{name}.base has {layer.base.numel()} elements (allowed: {MAX_ELEMENTS})")
    if not (in_place and layer.out.data_ptr() == layer.base.data_ptr()):
        check_apart(f"{name}.out", layer.out, f"{name}.base", layer.base)


def mix_adapters(plan: MergePlan, adapters: Sequence[Mapping[int, LowRankFactors]]) -> LowRankMix:
    """Prepare up to 8 adapters for merging: one mapping each from layer number to its factors; ranks may differ.

    Layers that no adapter names get the base back. Done once per mix: factors of channels_last convolutions are copied
    into the weight's memory order. Raises KernelArgumentError on what does not fit the plan.
    """
    if len(adapters) > MAX_ADAPTERS:
        raise KernelArgumentError(f"{len(adapters)} adapters (allowed: 0..{MAX_ADAPTERS})")
    ordered: list[dict[int, LowRankFactors]] = []
    for number, adapter in enumerate(adapters):
        ordered.append({})
        for layer, factors in adapter.items():
            if not 0 <= layer < len(plan.layers):
                raise KernelArgumentError(
                    f"adapters[{number}] names layer {layer} (allowed: 0..{len(plan.layers) - 1})"
                )
            check_factors(f"adapters[{number}][{layer}]", factors, plan.layers[layer].base)
            a = columns_in_memory_order(factors.a, plan.layers[layer].out) if plan.tables else factors.a
            ordered[-1][layer] = LowRankFactors(a, factors.b)
    if plan.tables is None:
        return LowRankMix(tuple(ordered), None)
    vector = rank_vector(ordered)
    return LowRankMix(tuple(ordered), mix_table(len(plan.layers), ordered, vector).to(plan.device), vector)


def check_factors(name: str, factors: LowRankFactors, base: Tensor) -> None:
    """Raise KernelArgumentError if one adapter's factors do not fit the weight."""
    rank = factors.a.shape[0] if factors.a.dim() == 2 else -1
    rows, cols = base.shape[0], prod(base.shape[1:])
    check_shape(f"{name}.a", factors.a, (None, cols))
    check_shape(f"{name}.b", factors.b, (rows, rank))
    if rank < 1:
        raise KernelArgumentError(f"{name}.a has rank {rank} (needed: at least 1)")
    for part, tensor in (("a", factors.a), ("b", factors.b)):
        check_dtype(f"{name}.{part}", tensor, (base.dtype,))
        check_device(f"{name}.{part}", tensor, base.device)
        check_contiguous(f"{name}.{part}", tensor)
        check_aligned(f"{name}.{part}", tensor)


def rank_vector(adapters: Sequence[Mapping[int, LowRankFactors]]) -> int:
    """Return 8 where every rank is a multiple of 8, so that rows of b are read 16 bytes at a time, or 1.

    Two compiled kernels are enough for all mixes.
    """
    return 1 if any(factors.a.shape[0] % 8 for adapter in adapters for factors in adapter.values()) else 8


def mix_table(layers: int, adapters: Sequence[Mapping[int, LowRankFactors]], vector: int) -> Tensor:
    """Return the table of a mix, [layers, adapters, 4] int64 on the CPU, with ranks in units of `vector`."""
    none = (0, 0, 0, 0)
    records = [
        (factors.a.data_ptr(), factors.b.data_ptr(), factors.a.shape[0] // vector, 0) if factors else none
        for layer in range(layers)
        for factors in (adapter.get(layer) for adapter in adapters)
    ]
    return torch.tensor(records, dtype=torch.int64).view(layers, len(adapters), 4)


def build_tables(layers: Sequence[MergeLayer], config: LaunchConfig) -> MergeTables:
    """Write the tables of a plan on the layers' device."""
    shapes = [MatrixShape(layer.base.shape[0], prod(layer.base.shape[1:]), 1) for layer in layers]
    vectors = [gcd(shape.cols, config["VECTOR"]) for shape in shapes]
    tiles = order_tiles(shapes, config["BLOCK_M"], config["BLOCK_N"])
    groups = []
    for vector in sorted(set(vectors), reverse=True):
        records = [(t.matrix, t.row, t.col, 0) for t in tiles if vectors[t.matrix] == vector]
        groups.append((torch.tensor(records, dtype=torch.int32, device=layers[0].base.device), vector))
    records64 = [
        (layer.base.data_ptr(), layer.out.data_ptr(), shape.rows, shape.cols // vector)
        for layer, shape, vector in zip(layers, shapes, vectors, strict=True)
    ]
    table = torch.tensor(records64, dtype=torch.int64, device=layers[0].base.device)
    return MergeTables(layers[0].base, tuple(groups), table, config)


def lowrank_merge(plan: MergePlan, mix: LowRankMix, scales: Tensor) -> None:
    """Write W' = W + sum_k scales[k] B_k A_k of every layer of `plan` into its `out` tensor, in place.

    scales [K] fp32 holds one factor per adapter of `mix`. The base comes back bit for bit with no adapters or with
    scales of 0. One launch, which can be captured in a CUDA graph and replayed after factors or scales changed in
    place. CPU plans take the reference. Raises KernelArgumentError on scales that do not fit.
    """
    check_dtype("scales", scales, (torch.float32, torch.float64) if plan.tables is None else (torch.float32,))
    check_shape("scales", scales, (len(mix.adapters),))
    check_device("scales", scales, plan.device)
    check_contiguous("scales", scales)
    if plan.tables is None or mix.table is None:
        reference(plan.layers, mix.adapters, scales)
        return
    for launch in launches(plan.tables, mix.table, scales, mix.rank_vector):
        launch.run()


def reference(layers: Sequence[MergeLayer], adapters: Sequence[Mapping[int, LowRankFactors]], scales: Tensor) -> None:
    """Do the same with torch, summing in float32, or in float64 for float64 weights."""
    for number, layer in enumerate(layers):
        wide = torch.float64 if layer.base.dtype == torch.float64 else torch.float32
        change = torch.zeros(layer.base.shape, dtype=wide, device=layer.base.device)
        for adapter, scale in zip(adapters, scales, strict=True):
            if number in adapter:
                product = adapter[number].b.to(wide) @ adapter[number].a.to(wide)
                change += scale.to(wide) * product.view(change.shape)
        layer.out.copy_(torch.where(change == 0, layer.base.to(wide), layer.base.to(wide) + change))


def launches(tables: MergeTables, mix_table: Tensor, scales: Tensor, rank_vector: int) -> list[Launch]:
    """Return the launches of one merge: one per vector width, one in practice."""
    config = tables.config
    found = []
    for tiles, vector in tables.groups:
        count = tiles.shape[0]
        arguments = {
            "first_ptr": tables.first,
            "tiles_ptr": tiles,
            "layers_ptr": tables.layers,
            "mix_ptr": mix_table,
            "scales_ptr": scales,
            "tile_count": count,
            # No constant: a merge of another number of adapters must not wait for the compiler.
            "adapters": scales.shape[0],
        }
        constants = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_R")}
        constants |= {"VECTOR": vector, "RANK_VECTOR": rank_vector}
        grid = (min(count, multiprocessors(scales.device) * config.programs_per_sm),)
        found.append(Launch(_merge_kernel, grid, arguments, constants, config.num_warps, config.num_stages))
    return found


@jit
def _product(a: tl.tensor, b: tl.tensor, rank: tl.tensor, m: tl.tensor, n: tl.tensor, rows: tl.tensor, cols: tl.tensor,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr) -> tl.tensor:  # fmt: skip
    # B A of one tile, fp32.
    change = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        left = read_tile(b, m, r, rows, rank)
        right = read_tile(a, r, n, rank, cols)
        change = tl.dot(left, right, change)
    return change


@jit
def _merge_kernel(first_ptr: tl.tensor, tiles_ptr: tl.tensor, layers_ptr: tl.tensor, mix_ptr: tl.tensor,
                  scales_ptr: tl.tensor, tile_count: tl.tensor, adapters: tl.tensor, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, VECTOR: tl.constexpr,
                  RANK_VECTOR: tl.constexpr) -> None:  # fmt: skip
    pointer = tl.pointer_type(first_ptr.dtype.element_ty)
    record = tiles_ptr + tl.program_id(0) * 4
    number = tl.load(record)
    row = tl.load(record + 1)
    col = tl.load(record + 2)
    for tile in tl.range(tl.program_id(0), tile_count, tl.num_programs(0)):
        here = number
        m = row * BLOCK_M + tl.arange(0, BLOCK_M)
        n = col * BLOCK_N + tl.arange(0, BLOCK_N)
        # The next tile's record, now: reading it at its turn would put a trip to memory before every tile.
        record += tl.num_programs(0) * 4
        more = tile + tl.num_programs(0) < tile_count
        number = tl.load(record, mask=more, other=0)
        row = tl.load(record + 1, mask=more, other=0)
        col = tl.load(record + 2, mask=more, other=0)
        layer = layers_ptr + here * 4
        base = tl.multiple_of(tl.load(layer).to(pointer), 16)
        out = tl.multiple_of(tl.load(layer + 1).to(pointer), 16)
        rows = tl.load(layer + 2).to(tl.int32)
        # Stored divided by VECTOR: multiplied back, the compiler knows how rows are aligned and loads vectors.
        cols = tl.load(layer + 3).to(tl.int32) * VECTOR
        # Asked for before the products, so that it is on its way while they run: the kernel lives on bandwidth.
        weight = read_once(base, m, n, rows, cols)
        change = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(adapters):
            entry = mix_ptr + (here * adapters + k) * 4
            rank = tl.load(entry + 2).to(tl.int32) * RANK_VECTOR
            if rank > 0:
                a = tl.multiple_of(tl.load(entry).to(pointer), 16)
                b = tl.multiple_of(tl.load(entry + 1).to(pointer), 16)
                product = _product(a, b, rank, m, n, rows, cols, BLOCK_M, BLOCK_N, BLOCK_R)
                change += tl.load(scales_ptr + k) * product
        write_sum(out, weight, change, m, n, rows, cols)
