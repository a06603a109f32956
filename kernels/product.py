"""The one matrix product behind the factored plan: y = x W^T with per-sample scales, or weights, and a bias fused in.

factored_linear uses it with scales on the output of its first product, factored_conv with each sample's own scaled U.
No operand is changed inside the loop: on Hopper that puts it into registers, which costs half as much time again
(spectral_reassemble: 6.3 ms instead of 4.2 on one H200, 2026-11-20), and Triton 3.6 overwrites them too early
(matrix_hazards.py).
"""

from typing import Any

import torch
from torch import Tensor

from hueshift.kernels.checks import ALIGNMENT
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, block_descriptor, jit, multiprocessors, tl
from hueshift.kernels.launch_table import LaunchConfig
from hueshift.kernels.tiles import blocks

# Columns of output up to which tiles of 256 would mostly compute padding.
NARROW = 384
CLASSES = ("whole_tiles", "narrow_tiles", "cut_tiles")
"""What shape_class returns."""


def product_launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    tokens: int,
    config: LaunchConfig,
    sigma: Tensor | None = None,
    index: Tensor | None = None,
    bias: Tensor | None = None,
) -> Launch:
    """Return the launch of y = x W^T (* sigma[index]) + bias.

    y [rows, M], x [rows, K], weight [M, K] or [samples, M, K] for weights of each sample's own, bias [M], all
    contiguous and of one 16-bit dtype; rows come in samples of `tokens`. sigma [slots, M] is fp32 with any slot stride,
    index [samples] int32 or int64; the multiplication is in fp32. A sample whose index lies outside 0..slots-1 gets
    NaN: wrong output must be seen, and no memory outside the slab is read. Raises KernelArgumentError where weights of
    samples' own meet tiles that do not end with a sample.
    """
    rows, depth = x.shape
    width = weight.shape[-2]
    own_weights = weight.dim() == 3
    weight = weight.flatten(0, -2)
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    if own_weights and tokens % block_m:
        raise KernelArgumentError(f"samples of {tokens} tokens (needed for their own weights: multiples of {block_m})")
    tma = config["TMA"] and tma_fits(x) and tma_fits(weight)
    scaled = sigma is not None and index is not None
    count = blocks(rows, block_m) * blocks(width, block_n)
    arguments = {
        "y_ptr": y,
        "x_source": block_descriptor(x, (block_m, block_k)) if tma else x,
        "w_source": block_descriptor(weight, (block_n, block_k)) if tma else weight,
        # Tensors must be passed even where their use is compiled out.
        "bias_ptr": y if bias is None else bias,
        "sigma_ptr": y if sigma is None else sigma,
        "index_ptr": y if index is None else index,
        "rows": rows,
        "width": width,
        "depth": depth,
        "tokens": tokens,
        "slots": 0 if sigma is None else sigma.shape[0],
        "slot_stride": 0 if sigma is None else sigma.stride(0),
    }
    constants: dict[str, Any] = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "FLATTEN")}
    constants |= {
        "TMA": tma,
        "SCALED": scaled,
        "OWN_WEIGHTS": own_weights,
        "BIAS": bias is not None,
        # A tile inside one sample needs one row of sigma, not one for each of its rows.
        "ONE_SAMPLE": tokens % block_m == 0,
    }
    grid = (min(count, multiprocessors(y.device) * config.programs_per_sm),)
    return Launch(_product_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


def shape_class(tokens: int, width: int) -> str:
    """Return the launch table's class for samples of `tokens` rows and `width` columns of output.

    Where whole tiles of 128 rows fit inside a sample, narrow outputs have a class of their own: of SD1.5's 320 columns
    tiles of 256 would compute 512, tiles of 128 still 384.
    """
    if tokens % 128:
        return "cut_tiles"
    return "narrow_tiles" if width <= NARROW else "whole_tiles"


def tma_fits(matrix: Tensor) -> bool:
    """Tell whether TMA can read `matrix`: not empty, rows beginning on 16-byte boundaries."""
    aligned = matrix.data_ptr() % ALIGNMENT == 0 and matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0
    return matrix.numel() > 0 and aligned


def product_reference(
    x: Tensor,
    weight: Tensor,
    *,
    tokens: int,
    sigma: Tensor | None = None,
    index: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return what the launch computes, in the dtype of x, with sums in float32, or float64 for float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    samples = x.view(x.shape[0] // max(tokens, 1), tokens, x.shape[1])
    value = (samples.to(wide) @ weight.to(wide).transpose(-2, -1)).flatten(0, 1)
    if sigma is not None and index is not None:
        value = value * sigma.to(wide)[index.long()].repeat_interleave(tokens, 0)
    return (value if bias is None else value + bias.to(wide)).to(x.dtype)


@jit
def load_block(source: tl.tensor, row: tl.tensor, col: tl.tensor, rows: tl.tensor, cols: tl.tensor,
                ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr) -> tl.tensor:  # fmt: skip
    if TMA:
        block = source.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        block = tl.load(source + r.to(tl.int64)[:, None] * cols + c[None, :], mask=mask, other=0.0)
    return block


@jit
def _slot(index_ptr: tl.tensor, row: tl.tensor, rows: tl.tensor, tokens: tl.tensor, BLOCK_M: tl.constexpr,
          ONE_SAMPLE: tl.constexpr) -> tl.tensor:  # fmt: skip
    # The adapter slot of rows row.., [1 or BLOCK_M] int64.
    if ONE_SAMPLE:
        slot = tl.load(index_ptr + row // tokens + tl.zeros((1,), tl.int32))
    else:
        r = row + tl.arange(0, BLOCK_M)
        slot = tl.load(index_ptr + r // tokens, mask=r < rows, other=0)
    return slot.to(tl.int64)


@jit
def _sigma(sigma_ptr: tl.tensor, slot: tl.tensor, col: tl.tensor, cols: tl.tensor, slots: tl.tensor,
           slot_stride: tl.tensor, COLS: tl.constexpr) -> tl.tensor:  # fmt: skip
    # sigma of the slots and columns col.., [1 or BLOCK_M, COLS] fp32; NaN where the index is not a slot.
    c = col + tl.arange(0, COLS)
    mask = ((slot >= 0) & (slot < slots))[:, None] & (c < cols)[None, :]
    return tl.load(sigma_ptr + slot[:, None] * slot_stride + c[None, :], mask=mask, other=float("nan"))


@jit
def _product_kernel(y_ptr: tl.tensor, x_source: tl.tensor, w_source: tl.tensor, bias_ptr: tl.tensor,
                    sigma_ptr: tl.tensor, index_ptr: tl.tensor, rows: tl.tensor, width: tl.tensor, depth: tl.tensor,
                    tokens: tl.tensor, slots: tl.tensor, slot_stride: tl.tensor, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr, TMA: tl.constexpr,
                    SCALED: tl.constexpr, OWN_WEIGHTS: tl.constexpr, BIAS: tl.constexpr,
                    ONE_SAMPLE: tl.constexpr) -> None:  # fmt: skip
    # Persistent; columns run fastest, so that programs that run together share rows of x in L2 (the weight fits whole).
    across = tl.cdiv(width, BLOCK_N)
    count = tl.cdiv(rows, BLOCK_M) * across
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=FLATTEN):
        row = tile // across * BLOCK_M
        col = tile % across * BLOCK_N
        # The first row of the weight: a sample's own lies behind those of the samples before it.
        first = col
        weight_rows = width
        if OWN_WEIGHTS:
            first += row // tokens * width
            weight_rows *= rows // tokens
        if SCALED:
            # Before the loop: inside it, one read behind another would take stages from the pipeline of x and w.
            slot = _slot(index_ptr, row, rows, tokens, BLOCK_M, ONE_SAMPLE)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, depth, BLOCK_K):
            x = load_block(x_source, row, k, rows, depth, BLOCK_M, BLOCK_K, TMA)
            w = load_block(w_source, first, k, weight_rows, depth, BLOCK_N, BLOCK_K, TMA)
            total = tl.dot(x, w.T, total)
        if SCALED:
            total = total * _sigma(sigma_ptr, slot, col, width, slots, slot_stride, BLOCK_N)
        m = row + tl.arange(0, BLOCK_M)
        n = col + tl.arange(0, BLOCK_N)
        if BIAS:
            total += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        mask = (m < rows)[:, None] & (n < width)[None, :]
        tl.store(y_ptr + m.to(tl.int64)[:, None] * width + n[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)
