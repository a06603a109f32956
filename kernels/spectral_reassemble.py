"""Rebuild weights from shifted singular values: W' = W + U diag(relu(sigma + delta) - sigma) V^T, all layers at once.

The shift of a row is that of SVDiff (Han et al. 2023, equation 4). The delta form costs the same multiplications as
the direct one, returns W bit for bit at delta = 0 and errs by the rounding of the 16-bit store alone: 2.1e-4 relative,
against 3.8e-4 for U diag(sigma') V^T with 16-bit factors. Always from the pristine base, never from a former swap.
"""

from typing import Any

import torch
from torch import Tensor

from hueshift.kernels.checks import check_contiguous, check_device, check_dtype, check_inner_contiguous, check_shape
from hueshift.kernels.device import halves, read_once, write_sum
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.fragments import add_to_words, in_order, read_words, write_words
from hueshift.kernels.launch import Launch, jit, tl
from hueshift.kernels.spectral_plan import SCALE_ROWS, GpuTables, SpectralLayer, SpectralPlan

MAX_ROWS = 8


def spectral_reassemble(plan: SpectralPlan, rows: Tensor, weights: Tensor, *, effective: bool = False) -> None:
    """Write W' of every layer of `plan` into its `out` tensor, in place.

    rows [R, S] fp32 holds R adapters' deltas (R from 0 to 8) and weights [R] fp32 their weights; a layer reads
    rows[:, offset : offset + rank], and delta = sum_i weights[i] rows[i]: a sum or an interpolation of adapters costs
    no pass of its own. With `effective` the single row holds relu(sigma + delta) itself. R = 0 restores the base.

    One launch scales the smaller factor of every layer; then there is one for each vector width of the columns (SD1.5
    and SDXL: one, and a small one for conv_in). Scaling inside their loop cost 2 ms instead of 0.23 (SD1.5, H200), and
    puts an operand into registers (matrix_hazards.py). Nothing is allocated and nothing read back, so it can
    be captured in a CUDA graph and replayed after `rows` or `weights` changed in place. Launches of one plan must
    follow each other on one stream. CPU plans take the reference. Raises KernelArgumentError on arguments that do not
    fit, KernelUnavailableError without Triton.
    """
    check_rows(plan, rows, weights, effective)
    if plan.tables is None:
        reference(plan.layers, rows, weights, effective=effective)
        return
    for launch in launches(plan.tables, rows, weights, effective=effective):
        launch.run()


def check_rows(plan: SpectralPlan, rows: Tensor, weights: Tensor, effective: bool) -> None:
    """Raise KernelArgumentError unless rows and weights fit the plan."""
    allowed = (torch.float32, torch.float64) if plan.tables is None else (torch.float32,)
    check_dtype("rows", rows, allowed)
    check_shape("rows", rows, (None, None))
    check_device("rows", rows, plan.device)
    check_inner_contiguous("rows", rows, 1)
    count, size = rows.shape
    if count > MAX_ROWS or (effective and count != 1):
        raise KernelArgumentError(f"rows has {count} adapters (allowed: {'1' if effective else f'0..{MAX_ROWS}'})")
    if size < plan.row_size:
        raise KernelArgumentError(
            f"rows is {size} values long (needed: at least {plan.row_size}, as the plan's layers)"
        )
    check_dtype("weights", weights, (rows.dtype,))
    check_shape("weights", weights, (count,))
    check_device("weights", weights, plan.device)
    check_contiguous("weights", weights)


def reference(layers: tuple[SpectralLayer, ...], rows: Tensor, weights: Tensor, *, effective: bool = False) -> None:
    """Do the same with torch: shifts in the dtype of `rows`, products in float32, or float64 for float64 factors."""
    for layer in layers:
        part = rows[:, layer.offset : layer.offset + layer.rank]
        sigma = layer.sigma.to(rows.dtype)
        shifted = part[0] if effective else torch.relu(sigma + (weights[:, None] * part).sum(0))
        wide = torch.float64 if layer.u.dtype == torch.float64 else torch.float32
        change = (layer.u.to(wide) * (shifted - sigma).to(wide)) @ layer.vh.to(wide)
        change = change.view(layer.base.shape)
        # Where nothing changes the base's own bits are kept: -0.0 + 0.0 would turn into +0.0.
        layer.out.copy_(torch.where(change == 0, layer.base.to(wide), layer.base.to(wide) + change))


def launches(tables: GpuTables, rows: Tensor, weights: Tensor, *, effective: bool) -> list[Launch]:
    """Return the launches that one reassembly takes, in order."""
    config = tables.config
    scale: dict[str, Any] = {
        "packed_ptr": tables.packed,
        "blocks_ptr": tables.scaled_blocks,
        "sigma_ptr": tables.sigma,
        "rows_ptr": rows,
        "weights_ptr": weights,
        "row_stride": rows.stride(0),
    }
    shape = {"BLOCK_K": config["BLOCK_K"], "ROWS": rows.shape[0], "EFFECTIVE": effective, "BLOCK_ROWS": SCALE_ROWS}
    found = [Launch(_scale_kernel, (tables.scaled_blocks.shape[0],), scale, shape, 4, 1)]
    constants = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA", "DIRECT")}
    for group in tables.groups:
        arguments = {
            "a_source": tables.a_source,
            "b_source": tables.b_source,
            "tiles_ptr": group.tiles,
            "counts_ptr": group.counts,
            "layers_ptr": tables.layers,
        }
        grid = (group.counts.shape[0],)
        variant = {**constants, "VECTOR": group.vector}
        found.append(Launch(_reassemble_kernel, grid, arguments, variant, config.num_warps, config.num_stages))
    return found


@jit
def _shift(sigma_ptr: tl.tensor, rows_ptr: tl.tensor, weights_ptr: tl.tensor, row_stride: tl.tensor,
           at: tl.tensor, mask: tl.tensor, ROWS: tl.constexpr, EFFECTIVE: tl.constexpr) -> tl.tensor:  # fmt: skip
    # d = relu(sigma + sum_i w_i delta_i) - sigma in fp32; 0 where masked.
    sigma = tl.load(sigma_ptr + at, mask=mask, other=0.0)
    if EFFECTIVE:
        value = tl.load(rows_ptr + at, mask=mask, other=0.0)
    else:
        value = sigma
        for i in tl.static_range(ROWS):
            value += tl.load(weights_ptr + i) * tl.load(rows_ptr + i * row_stride + at, mask=mask, other=0.0)
        value = tl.maximum(value, 0.0)
    return value - sigma


@jit
def _scale_kernel(packed_ptr: tl.tensor, blocks_ptr: tl.tensor, sigma_ptr: tl.tensor, rows_ptr: tl.tensor,
                  weights_ptr: tl.tensor, row_stride: tl.tensor, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
                  EFFECTIVE: tl.constexpr, BLOCK_ROWS: tl.constexpr) -> None:  # fmt: skip
    # One block of the smaller factor of a layer, times its shift, into the scratch part of the same buffer.
    record = blocks_ptr + tl.program_id(0) * 4
    source = tl.load(record).to(tl.int64)
    target = tl.load(record + 1).to(tl.int64)
    first = tl.load(record + 2)
    left = tl.load(record + 3)
    k = tl.arange(0, BLOCK_K)
    shift = _shift(sigma_ptr, rows_ptr, weights_ptr, row_stride, first + k, k < left, ROWS, EFFECTIVE)
    inside = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_K + k[None, :]
    block = tl.load(packed_ptr + source * BLOCK_K + inside)
    scaled = block.to(tl.float32) * shift[None, :]
    tl.store(packed_ptr + target * BLOCK_K + inside, scaled.to(block.dtype))


@jit
def _block(source: tl.tensor, row: tl.tensor, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
           TMA: tl.constexpr) -> tl.tensor:  # fmt: skip
    if TMA:
        block = source.load([row, 0])
    else:
        inside = tl.arange(0, ROWS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        block = tl.load(source + row.to(tl.int64) * BLOCK_K + inside)
    return block


@jit
def _read_slice(base: tl.tensor, m: tl.tensor, first_col: tl.tensor, rows: tl.tensor, cols: tl.tensor,
                WIDTH: tl.constexpr) -> tl.tensor:  # fmt: skip
    return read_once(base, m, first_col + tl.arange(0, WIDTH), rows, cols)


@jit
def _write_slice(out: tl.tensor, weight: tl.tensor, change: tl.tensor, m: tl.tensor, first_col: tl.tensor,
                 rows: tl.tensor, cols: tl.tensor, WIDTH: tl.constexpr) -> None:  # fmt: skip
    write_sum(out, weight, change, m, first_col + tl.arange(0, WIDTH), rows, cols)


@jit
def _place(record: tl.tensor, layers_ptr: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           VECTOR: tl.constexpr) -> tl.tensor:  # fmt: skip
    # Addresses of the layer's base and output, first row and column of a tile, and the layer's size.
    layer = layers_ptr + tl.load(record + 3) * 4
    row = tl.load(record + 4) * BLOCK_M
    col = tl.load(record + 5) * BLOCK_N
    rows = tl.load(layer + 2).to(tl.int32)
    # Stored divided by VECTOR: multiplied back, the compiler knows how rows are aligned and loads vectors.
    cols = tl.load(layer + 3).to(tl.int32) * VECTOR
    return tl.load(layer), tl.load(layer + 1), row, col, rows, cols


@jit
def _finish(change: tl.tensor, record: tl.tensor, layers_ptr: tl.tensor, element: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr) -> None:  # fmt: skip
    # Base plus change of one tile, in the layout that loads and stores have: through shared memory.
    QUARTER: tl.constexpr = BLOCK_N // 4
    pointer = tl.pointer_type(element)
    base, out, row, col, rows, cols = _place(record, layers_ptr, BLOCK_M, BLOCK_N, VECTOR)
    base = tl.multiple_of(base.to(pointer), 16)
    out = tl.multiple_of(out.to(pointer), 16)
    m = row + tl.arange(0, BLOCK_M)
    # All reads before the first write, so that their latencies overlap.
    first_weight = _read_slice(base, m, col, rows, cols, QUARTER)
    second_weight = _read_slice(base, m, col + QUARTER, rows, cols, QUARTER)
    third_weight = _read_slice(base, m, col + 2 * QUARTER, rows, cols, QUARTER)
    fourth_weight = _read_slice(base, m, col + 3 * QUARTER, rows, cols, QUARTER)
    # By column slices: the addresses of a whole tile would not fit in registers beside the sum.
    left, right = halves(change, BLOCK_M, BLOCK_N)
    first_part, second_part = halves(left, BLOCK_M, BLOCK_N // 2)
    third_part, fourth_part = halves(right, BLOCK_M, BLOCK_N // 2)
    _write_slice(out, first_weight, first_part, m, col, rows, cols, QUARTER)
    _write_slice(out, second_weight, second_part, m, col + QUARTER, rows, cols, QUARTER)
    _write_slice(out, third_weight, third_part, m, col + 2 * QUARTER, rows, cols, QUARTER)
    _write_slice(out, fourth_weight, fourth_part, m, col + 3 * QUARTER, rows, cols, QUARTER)


@jit
def _pieces(row: tl.tensor, col: tl.tensor, rows: tl.tensor, cols: tl.tensor, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr) -> tl.tensor:  # fmt: skip
    # Of the 16-byte pieces of a tile, counted from the start of the matrix; -1 outside.
    m = row + tl.arange(0, BLOCK_M)
    n = col // 8 + tl.arange(0, BLOCK_N // 8)
    inside = (m < rows)[:, None] & (n < cols // 8)[None, :]
    return tl.where(inside, m[:, None] * (cols // 8) + n[None, :], -1)


@jit
def _reassemble_kernel(a_source: tl.tensor, b_source: tl.tensor, tiles_ptr: tl.tensor, counts_ptr: tl.tensor,
                       layers_ptr: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                       TMA: tl.constexpr, DIRECT: tl.constexpr, VECTOR: tl.constexpr) -> None:  # fmt: skip
    # One loop over all blocks of all tiles of this program, longest sums first: the blocks of the next tile are on
    # their way while a tile is finished, so the tensor cores wait for memory once a launch and not once a tile.
    element: tl.constexpr = a_source.dtype if TMA else a_source.dtype.element_ty
    WORDS: tl.constexpr = DIRECT and VECTOR == 8 and element.primitive_bitwidth == 16
    record = tiles_ptr + (tl.program_id(0) - tl.num_programs(0)) * 6
    a_row = 0
    b_row = 0
    block = 0
    deep = 0
    change = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WORDS:
        first = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
        second, third, fourth = first, first, first
        out = tl.full((), 0, tl.int64)
        row, col, rows, cols = 0, 0, 0, 0
    for _ in tl.range(tl.load(counts_ptr + tl.program_id(0))):
        # Addresses follow from `block`: a counter that no load needs would be computed in a later stage than the one
        # that reads it next, and the compiler would leave the loop without a pipeline.
        block = tl.where(block >= deep - 1, 0, block + 1)
        if block == 0:
            record += tl.num_programs(0) * 6
            a_row = tl.load(record)
            b_row = tl.load(record + 1)
            deep = tl.load(record + 2)
        a = _block(a_source, a_row + block * BLOCK_M, BLOCK_M, BLOCK_K, TMA)
        b = _block(b_source, b_row + block * BLOCK_N, BLOCK_N, BLOCK_K, TMA)
        if WORDS:
            # The base's words, and where the tile goes, arrive while the last blocks are multiplied.
            early = tl.maximum(deep - 2, 0)
            if block == early:
                base, out, row, col, rows, cols = _place(record, layers_ptr, BLOCK_M, BLOCK_N, VECTOR)
                first, second, third, fourth = read_words(base, _pieces(row, col, rows, cols, BLOCK_M, BLOCK_N))
        change = tl.dot(a, b.T, change)
        if block == deep - 1:
            if WORDS:
                tile = in_order(change, BLOCK_M, BLOCK_N)
                sums = add_to_words((first, second, third, fourth), tile, element, BLOCK_M, BLOCK_N)
                write_words(out, _pieces(row, col, rows, cols, BLOCK_M, BLOCK_N), sums)
            elif DIRECT:
                _finish(in_order(change, BLOCK_M, BLOCK_N), record, layers_ptr, element, BLOCK_M, BLOCK_N, VECTOR)
            else:
                _finish(change, record, layers_ptr, element, BLOCK_M, BLOCK_N, VECTOR)
            change = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
