"""Layer norm (Ba et al. 2016) over the last dimension, with weights for everybody or each sample's own, in one pass.

The factored plan shifts the weights of norms as singular values (SVDiff, Han et al. 2023), so samples of one batch have
different ones. torch's layer norm knows one row of weights: there it normalises without, and a product with the rows in
fp32, a cast and a sum follow, four passes over activations more.

Behind each layer of a transformer stands a sum, and behind that the next norm: both at once read and write each of the
two once, where one after the other reads the sum again and is a launch more.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.checks import (
    HALF_TYPES,
    REFERENCE_TYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_index,
    check_inner_contiguous,
    check_shape,
)
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, jit, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.tiles import blocks

KERNEL = "layer_norm"
# A row stays in registers: 64 numbers a thread where one warp has it. SDXL's widest are 1280.
MAX_WIDTH = 2048


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, index: Tensor | None = None) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias [N, T, C], over the last dimension of x.

    x [N, T, C] contiguous with C from 1 to 2048; bias [C] of x's dtype. Without index, weight [C] of x's dtype. With
    index [N] int32 or int64, weight [slots, C] fp32 (float64 for float64 x) of any slot stride: sample n has the row
    weight[index[n]], and on a GPU a wrong index gives that sample NaN. fp16 or bf16 on a GPU; fp32 arithmetic (float64
    for float64), rounded once. CPU tensors take the reference. Raises KernelArgumentError on what does not fit.
    """
    check_arguments(x, weight, bias, eps, index)
    if not on_gpu(x):
        return reference(x, weight, bias, eps, index)
    out = torch.empty_like(x)
    norm_launch(out, x, weight, bias, eps, index).run()
    return out


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return x + residual, rounded to their dtype, and the layer norm of that sum; the rest as layer_norm.

    residual [N, T, C] contiguous, of x's dtype.
    """
    check_arguments(x, weight, bias, eps, index)
    check_shape("residual", residual, tuple(x.shape))
    check_dtype("residual", residual, (x.dtype,))
    check_contiguous("residual", residual)
    check_device("residual", residual, x.device)
    if not on_gpu(x):
        total = x + residual
        return total, reference(total, weight, bias, eps, index)
    total, out = torch.empty_like(x), torch.empty_like(x)
    norm_launch(out, x, weight, bias, eps, index, residual=residual, total=total).run()
    return total, out


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor, eps: float, index: Tensor | None) -> None:
    """Raise KernelArgumentError unless the arguments fit each other."""
    check_dtype("x", x, HALF_TYPES if x.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("x", x, (None, None, None))
    check_contiguous("x", x)
    samples, _, width = x.shape
    if not 1 <= width <= MAX_WIDTH:
        raise KernelArgumentError(f"x has {width} columns (allowed: 1..{MAX_WIDTH}; wider rows stay with torch)")
    # Written so that NaN is refused.
    if not eps >= 0:
        raise KernelArgumentError(f"eps is {eps} (allowed: from 0)")
    check_shape("bias", bias, (width,))
    check_dtype("bias", bias, (x.dtype,))
    check_contiguous("bias", bias)
    others = [("weight", weight), ("bias", bias)]
    if index is None:
        check_shape("weight", weight, (width,))
        check_dtype("weight", weight, (x.dtype,))
    else:
        check_shape("weight", weight, (None, width))
        check_dtype("weight", weight, (torch.float64 if x.dtype == torch.float64 else torch.float32,))
        check_index("index", index, 0, weight.shape[0])
        check_shape("index", index, (samples,))
        others.append(("index", index))
    check_inner_contiguous("weight", weight, 1)
    for name, tensor in others:
        check_device(name, tensor, x.device)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, index: Tensor | None = None) -> Tensor:
    """Do the same with torch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = (x.shape[2],)
    if index is None:
        return functional.layer_norm(x.to(wide), width, weight.to(wide), bias.to(wide), eps).to(x.dtype)
    normal = functional.layer_norm(x.to(wide), width, None, None, eps)
    return (normal * weight.to(wide)[index.long()][:, None] + bias.to(wide)).to(x.dtype)


def split_width(width: int) -> tuple[int, int]:
    """Return the columns of the two tiles that cover a row, powers of two; the second is 0 where one does it as well.

    The widths of the UNets are five times a power of two: 320 is 256 and 64, where one tile would be 512 columns, a
    third of them idle.
    """
    whole = max(16, 1 << (width - 1).bit_length())
    rest = width - whole // 2
    tail = 1 << (rest - 1).bit_length() if rest > 0 else whole
    return (whole // 2, max(8, tail)) if max(8, tail) <= whole // 4 else (whole, 0)


def norm_launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    index: Tensor | None,
    config: LaunchConfig | None = None,
    *,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Launch:
    """Return the launch that fills `out`, and `total` with x + residual where given; `config` replaces the table's."""
    config = config or choose(x.device, KERNEL)
    samples, tokens, width = x.shape
    if index is None:
        samples, tokens = 1, samples * tokens
    vector = gcd(width, 8)
    main, tail = split_width(width)
    # So that the numbers a program holds do not grow with the width: 4 tokens of SD1.5's 320 columns, 1 of its 1280.
    block = max(1, min(16, config["ELEMENTS"] // (2 * main if tail else main)))
    stride = 0 if index is None else weight.stride(0)
    # Rows of a slab that begin on 16-byte boundaries are read 16 bytes a thread.
    step = gcd(stride, 4)
    arguments = {
        "out_ptr": out,
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        # A tensor must be passed even where its use is compiled out.
        "index_ptr": bias if index is None else index,
        "residual_ptr": x if residual is None else residual,
        "total_ptr": out if total is None else total,
        "eps": eps,
        "tokens": tokens,
        # Triton learns only of multiples of 16 by itself: divided here, multiplied back by a constant there.
        "width": width // vector,
        "slots": 1 if index is None else weight.shape[0],
        "slot_stride": stride // step,
    }
    constants = {"BLOCK_T": block, "MAIN": main, "TAIL": tail, "VECTOR": vector, "STEP": step}
    constants |= {"INDEXED": index is not None, "ADD": residual is not None}
    grid = (blocks(tokens, block), samples)
    return Launch(_norm_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


@jit
def _scale_and_shift(centred: tl.tensor, deviation: tl.tensor, weight: tl.tensor, bias_ptr: tl.tensor, col: tl.tensor,
                     width: tl.tensor, known: tl.tensor) -> tl.tensor:  # fmt: skip
    scale = tl.load(weight + col, mask=(col < width) & known, other=float("nan")).to(tl.float32)
    shift = tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    return centred * deviation[:, None] * scale[None, :] + shift[None, :]


@jit
def _read(x_ptr: tl.tensor, residual_ptr: tl.tensor, total_ptr: tl.tensor, at: tl.tensor, inside: tl.tensor,
          ADD: tl.constexpr) -> tl.tensor:  # fmt: skip
    # In fp32; a sum as it is kept, rounded once.
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADD:
        total = x.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = total.to(x.dtype)
        tl.store(total_ptr + at, x, mask=inside)
    return x.to(tl.float32)


@jit
def _norm_kernel(out_ptr: tl.tensor, x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
                 index_ptr: tl.tensor, residual_ptr: tl.tensor, total_ptr: tl.tensor, eps: tl.tensor,
                 tokens: tl.tensor, width: tl.tensor, slots: tl.tensor, slot_stride: tl.tensor, BLOCK_T: tl.constexpr,
                 MAIN: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr,
                 INDEXED: tl.constexpr, ADD: tl.constexpr) -> None:  # fmt: skip
    # Tokens of one sample, so of one row of weights. The two tiles lie side by side in a row. The mean goes off before
    # squares are summed: a difference of large sums would lose the variance of activations far from zero.
    width = width * VECTOR
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = (sample * tokens + token) * width
    col = tl.arange(0, MAIN)
    inside = (token < tokens)[:, None] & (col < width)[None, :]
    x = _read(x_ptr, residual_ptr, total_ptr, row[:, None] + col[None, :], inside, ADD)
    total = tl.sum(x, 1)
    if TAIL:
        last = MAIN + tl.arange(0, TAIL)
        last_inside = (token < tokens)[:, None] & (last < width)[None, :]
        rest = _read(x_ptr, residual_ptr, total_ptr, row[:, None] + last[None, :], last_inside, ADD)
        total += tl.sum(rest, 1)
    mean = total / width
    x = tl.where(inside, x - mean[:, None], 0.0)
    total = tl.sum(x * x, 1)
    if TAIL:
        rest = tl.where(last_inside, rest - mean[:, None], 0.0)
        total += tl.sum(rest * rest, 1)
    deviation = tl.rsqrt(total / width + eps)
    weight = weight_ptr
    known = sample >= 0
    if INDEXED:
        slot = tl.load(index_ptr + sample).to(tl.int64)
        known = (slot >= 0) & (slot < slots)
        weight += slot * slot_stride * STEP
    y = _scale_and_shift(x, deviation, weight, bias_ptr, col, width, known)
    tl.store(out_ptr + row[:, None] + col[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
    if TAIL:
        y = _scale_and_shift(rest, deviation, weight, bias_ptr, last, width, known)
        tl.store(out_ptr + row[:, None] + last[None, :], y.to(out_ptr.dtype.element_ty), mask=last_inside)
