"""The plan of a spectral reassembly: packed factors, tile table and pointers of one model, built once.

The plan keeps its own packed copy of the singular vectors (SD1.5: 2.2 GB in 16 bit, SDXL: 7.5 GB), plus a scratch copy
of the smaller ones (0.4 GB, 2.2 GB) where the launch configuration pre-scales them.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from hueshift.kernels.checks import (
    HALF_TYPES,
    MAX_ELEMENTS,
    REFERENCE_TYPES,
    check_aligned,
    check_all_apart,
    check_apart,
    check_device,
    check_dtype,
    check_shape,
    span,
)
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import block_descriptor, multiprocessors
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.memory_format import check_format, columns_in_memory_order
from hueshift.kernels.tiles import MatrixShape, blocks, interleave, order_tiles, pack, packed_rows

# Rows of one block of the pre-scaling kernel; block heights are multiples of it.
SCALE_ROWS = 32


@dataclass(frozen=True, slots=True)
class SpectralLayer:
    """One weight and its singular value decomposition base = u diag(sigma) vh.

    u [m, r] and vh [r, n] share the weight's dtype (fp16 or bf16 on a GPU), sigma [r] is fp32; n runs over
    (c_in, kh, kw). `base` and `out` have the weight's own shape, [m, n] or [m, c_in, kh, kw], and one memory format,
    contiguous or channels_last; `out` is written, `base` never. The layer reads values offset .. offset + r of a row.
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor
    base: Tensor
    out: Tensor
    offset: int

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return self.sigma.shape[0]


@dataclass(frozen=True)
class Schedule:
    """The work of one launch, for layers whose columns are a multiple of `vector`.

    tiles [T, 6] int32: first packed row of A and of B, blocks in depth, layer, tile row, tile column. Program
    p of P takes tiles p, p + P, ...; counts [P] int32 are the blocks in depth of all its tiles.
    """

    tiles: Tensor
    counts: Tensor
    vector: int


@dataclass(frozen=True)
class GpuTables:
    """What the kernels read. `packed` [rows, BLOCK_K] holds every factor in blocks, then scratch for scaled ones.

    groups: one for each vector width, at most two in practice: of SD1.5's and SDXL's layers only conv_in, with 36
    columns, does not divide by 8.
    layers [L, 4] int64: addresses of base and out, rows, columns in vectors.
    scaled_blocks [B, 4] int32: packed row to read, packed row to write, offset in a row, values left.
    """

    packed: Tensor
    a_source: Any
    b_source: Any
    sigma: Tensor
    groups: tuple[Schedule, ...]
    layers: Tensor
    scaled_blocks: Tensor
    config: LaunchConfig


@dataclass(frozen=True)
class SpectralPlan:
    """Layers of one model that are rebuilt together. It keeps the tensors alive whose addresses the tables hold."""

    layers: tuple[SpectralLayer, ...]
    device: torch.device
    row_size: int
    tables: GpuTables | None


def plan_spectral(layers: Sequence[SpectralLayer], *, config: LaunchConfig | None = None) -> SpectralPlan:
    """Build the plan of these layers; `config` replaces the launch table's choice.

    Raises KernelArgumentError on an empty list and on wrong shapes, dtypes, devices, strides, alignment or overlap.
    """
    if not layers:
        raise KernelArgumentError("layers is empty (needed: at least one)")
    device = layers[0].base.device
    for number, layer in enumerate(layers):
        check_layer(f"layers[{number}]", layer, device, layers[0].base.dtype)
    check_outs(layers)
    row_size = max(layer.offset + layer.rank for layer in layers)
    tables = None
    if device.type == "cuda":
        tables = build_tables(layers, row_size, config or choose(device, "spectral_reassemble"))
    return SpectralPlan(tuple(layers), device, row_size, tables)


def share_plan(plan: SpectralPlan, outs: Sequence[Tensor]) -> SpectralPlan:
    """Return the plan of the same layers with other `out` tensors. It reads the same packed factors.

    Launches of both must follow each other on one stream: the scratch copy of scaled factors is shared too. Raises
    KernelArgumentError unless each of `outs` fits its layer as plan_spectral demands.
    """
    if len(outs) != len(plan.layers):
        raise KernelArgumentError(f"{len(outs)} outs (needed: {len(plan.layers)}, one for each layer)")
    layers = tuple(replace(layer, out=out) for layer, out in zip(plan.layers, outs, strict=True))
    for number, layer in enumerate(layers):
        check_layer(f"layers[{number}]", layer, plan.device, layers[0].base.dtype)
    check_outs(layers)
    tables = plan.tables
    if tables is not None:
        # The addresses are all that differs.
        tables = replace(tables, layers=_layer_table(layers, _vectors(layers, tables.config)).to(plan.device))
    return SpectralPlan(layers, plan.device, plan.row_size, tables)


def check_layer(name: str, layer: SpectralLayer, device: torch.device, dtype: torch.dtype) -> None:
    """Raise KernelArgumentError if one layer's tensors do not fit each other or the kernels."""
    check_dtype(f"{name}.base", layer.base, HALF_TYPES if device.type == "cuda" else REFERENCE_TYPES)
    check_dtype(f"{name}.sigma", layer.sigma, (torch.float32, torch.float64))
    rows, cols = layer.base.shape[0], prod(layer.base.shape[1:])
    rank = layer.sigma.shape[0] if layer.sigma.dim() == 1 else -1
    check_shape(f"{name}.sigma", layer.sigma, (None,))
    if not 1 <= rank <= min(rows, cols):
        raise KernelArgumentError(f"{name}.sigma has {rank} values (allowed: 1..{min(rows, cols)})")
    if rows * cols > MAX_ELEMENTS:
        raise KernelArgumentError(
            f"{name}.base has {rows * cols} elements (allowed: {MAX_ELEMENTS}, 32-bit addressing)"
        )
    if layer.offset < 0:
        raise KernelArgumentError(f"{name}.offset is {layer.offset} (allowed: 0 or more)")
    check_shape(f"{name}.u", layer.u, (rows, rank))
    check_shape(f"{name}.vh", layer.vh, (rank, cols))
    check_shape(f"{name}.out", layer.out, tuple(layer.base.shape))
    for part, tensor in (("base", layer.base), ("u", layer.u), ("vh", layer.vh), ("out", layer.out)):
        check_dtype(f"{name}.{part}", tensor, (dtype,))
        check_device(f"{name}.{part}", tensor, device)
    check_device(f"{name}.sigma", layer.sigma, device)
    check_format(name, layer.base, layer.out)
    for part, tensor in (("base", layer.base), ("out", layer.out)):
        check_aligned(f"{name}.{part}", tensor)
    check_apart(f"{name}.out", layer.out, f"{name}.base", layer.base)


def check_outs(layers: Sequence[SpectralLayer]) -> None:
    """Raise KernelArgumentError if two layers write the same memory, or one writes what another reads as its base:
    which of them comes first is a matter of chance.
    """
    check_all_apart([(f"layers[{number}].out", layer.out) for number, layer in enumerate(layers)])
    outs = sorted((*span(layer.out), number) for number, layer in enumerate(layers))
    for number, layer in enumerate(layers):
        begin, end = span(layer.base)
        # The last that begins before the base ends; all others end before that one begins.
        before = bisect_left(outs, end, key=lambda found: found[0]) - 1
        if before >= 0 and outs[before][1] > begin:
            check_apart(
                f"layers[{outs[before][2]}].out", layers[outs[before][2]].out, f"layers[{number}].base", layer.base
            )


def build_tables(layers: Sequence[SpectralLayer], row_size: int, config: LaunchConfig) -> GpuTables:
    """Pack the factors and write the tables on the layers' device."""
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    first = layers[0].base
    sizes = []
    for layer in layers:
        u_rows = packed_rows(layer.u.shape[0], layer.rank, block_m, block_k)
        v_rows = packed_rows(layer.vh.shape[1], layer.rank, block_n, block_k)
        sizes.append((u_rows, v_rows, min(u_rows, v_rows)))
    packed = torch.zeros(sum(map(sum, sizes)), block_k, dtype=first.dtype, device=first.device)
    sigma = torch.zeros(row_size, dtype=torch.float32, device=first.device)
    position = 0
    starts: list[tuple[int, int]] = []
    scaled: list[tuple[int, int, int, int]] = []
    for layer, (u_rows, v_rows, scratch) in zip(layers, sizes, strict=True):
        sigma[layer.offset : layer.offset + layer.rank] = layer.sigma
        u_start, v_start, spare = position, position + u_rows, position + u_rows + v_rows
        pack(layer.u, packed[u_start:v_start], block_m, block_k)
        pack(columns_in_memory_order(layer.vh, layer.out).t(), packed[v_start:spare], block_n, block_k)
        if config["DIRECT"]:
            interleave(packed[v_start:spare])
        if u_rows <= v_rows:
            scaled += _scaled_blocks(layer, u_start, spare, u_rows, block_m, block_k)
            u_start = spare
        else:
            scaled += _scaled_blocks(layer, v_start, spare, v_rows, block_n, block_k)
            v_start = spare
        starts.append((u_start, v_start))
        position += u_rows + v_rows + scratch
    vectors = _vectors(layers, config)
    return GpuTables(
        packed=packed,
        a_source=block_descriptor(packed, (block_m, block_k)) if config["TMA"] else packed,
        b_source=block_descriptor(packed, (block_n, block_k)) if config["TMA"] else packed,
        sigma=sigma,
        groups=tuple(
            _schedule(layers, starts, config, vector, [v == vector for v in vectors])
            for vector in sorted(set(vectors), reverse=True)
        ),
        layers=_layer_table(layers, vectors).to(first.device),
        scaled_blocks=torch.tensor(scaled, dtype=torch.int32, device=first.device),
        config=config,
    )


def _scaled_blocks(
    layer: SpectralLayer, source: int, target: int, count: int, block_rows: int, block_k: int
) -> list[tuple[int, int, int, int]]:
    deep = blocks(layer.rank, block_k)
    found = []
    for row in range(0, count, SCALE_ROWS):
        k = row // block_rows % deep * block_k
        found.append((source + row, target + row, layer.offset + k, min(block_k, layer.rank - k)))
    return found


def _schedule(
    layers: Sequence[SpectralLayer],
    starts: Sequence[tuple[int, int]],
    config: LaunchConfig,
    vector: int,
    chosen: Sequence[bool],
) -> Schedule:
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    device = layers[0].base.device
    shapes = [MatrixShape(layer.u.shape[0], layer.vh.shape[1], layer.rank) for layer in layers]
    records = []
    for tile in order_tiles(shapes, block_m, block_n):
        if chosen[tile.matrix]:
            deep = blocks(layers[tile.matrix].rank, block_k)
            u_start, v_start = starts[tile.matrix]
            a_row, b_row = u_start + tile.row * deep * block_m, v_start + tile.col * deep * block_n
            records.append((a_row, b_row, deep, tile.matrix, tile.row, tile.col))
    tiles = torch.tensor(records, dtype=torch.int32)
    programs = min(len(records), multiprocessors(device) * config.programs_per_sm)
    counts = torch.stack([tiles[start::programs, 2].sum() for start in range(programs)]).to(torch.int32)
    return Schedule(tiles.to(device), counts.to(device), vector)


def _vectors(layers: Sequence[SpectralLayer], config: LaunchConfig) -> list[int]:
    return [gcd(layer.vh.shape[1], config["VECTOR"]) for layer in layers]


def _layer_table(layers: Sequence[SpectralLayer], vectors: Sequence[int]) -> Tensor:
    records = [
        (x.base.data_ptr(), x.out.data_ptr(), x.u.shape[0], x.vh.shape[1] // vector)
        for x, vector in zip(layers, vectors, strict=True)
    ]
    return torch.tensor(records, dtype=torch.int64)
