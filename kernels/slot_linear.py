"""A linear layer whose whole weight is each sample's own: y[n] = x[n] W[index[n]]^T + b.

For layers that see many tokens and have small weights, such as attention on SD1.5's large pictures (4096 tokens, 320
columns): putting W' = U diag(sigma') V^T + B A together once, when an adapter is attached, costs less than the second
product of the factored form costs in one step (2 C^3 against 2 T C^2 a picture), and then nothing is added to the dense
product but the choice of its weight.
"""

import torch
from torch import Tensor

from hueshift.kernels.checks import (
    HALF_TYPES,
    REFERENCE_TYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_index,
    check_shape,
)
from hueshift.kernels.launch import Launch, block_descriptor, jit, multiprocessors, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.product import NARROW, load_block, tma_fits
from hueshift.kernels.tiles import blocks

KERNEL = "slot_linear"
CLASSES = ("narrow_tiles", "whole_tiles")


def slot_linear(x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y [N, T, out], y[n] = x[n] @ weights[index[n]].T + bias.

    x [N, T, in], weights [slots, out, in] and bias [out]: contiguous, one dtype (fp16 or bf16 on a GPU); index [N]
    int32 or int64 of 0..slots-1. Sums in fp32, rounded once. On a GPU a wrong index gives that sample NaN (see
    checks.check_index). CPU tensors take the reference. Raises KernelArgumentError on what does not fit.
    """
    check_arguments(x, weights, index, bias)
    if not on_gpu(x):
        return reference(x, weights, index, bias)
    y = x.new_empty(*x.shape[:2], weights.shape[1])
    linear_launch(y, x, weights, index, bias).run()
    return y


def check_arguments(x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None) -> None:
    """Raise KernelArgumentError unless the arguments fit each other."""
    check_dtype("x", x, HALF_TYPES if x.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("x", x, (None, None, None))
    check_shape("weights", weights, (None, None, x.shape[2]))
    check_index("index", index, 0, weights.shape[0])
    check_shape("index", index, (x.shape[0],))
    for name, tensor in (("x", x), ("weights", weights), ("index", index)):
        check_contiguous(name, tensor)
        check_device(name, tensor, x.device)
    check_dtype("weights", weights, (x.dtype,))
    if bias is not None:
        check_dtype("bias", bias, (x.dtype,))
        check_shape("bias", bias, (weights.shape[1],))
        check_contiguous("bias", bias)
        check_device("bias", bias, x.device)


def reference(x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do the same with torch: sums in float32, or float64 for float64, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Sample by sample: gathering the weights of all would copy them.
    rows = zip(x, index.tolist(), strict=True)
    made = [(part.to(wide) @ weights[slot].to(wide).t()) for part, slot in rows]
    y = torch.stack(made) if made else x.new_empty(0, x.shape[1], weights.shape[1], dtype=wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def linear_launch(
    y: Tensor, x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None, config: LaunchConfig | None = None
) -> Launch:
    """Return the launch of one call; `config` replaces the launch table's choice."""
    samples, tokens, depth = x.shape
    slots, width, _ = weights.shape
    config = config or choose(x.device, KERNEL, shape_class(width))
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    rows, stacked = x.flatten(0, 1), weights.flatten(0, 1)
    tma = config["TMA"] and tma_fits(rows) and tma_fits(stacked)
    count = samples * blocks(tokens, block_m) * blocks(width, block_n)
    arguments = {
        "y_ptr": y,
        "x_source": block_descriptor(rows, (block_m, block_k)) if tma else rows,
        "w_source": block_descriptor(stacked, (block_n, block_k)) if tma else stacked,
        # A tensor must be passed even where the bias is compiled out.
        "bias_ptr": y if bias is None else bias,
        "index_ptr": index,
        "samples": samples,
        "tokens": tokens,
        "width": width,
        "depth": depth,
        "slots": slots,
    }
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "TMA": tma, "BIAS": bias is not None}
    grid = (min(count, multiprocessors(y.device) * config.programs_per_sm),)
    return Launch(_slot_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


def shape_class(width: int) -> str:
    """Return the launch table's class for so many columns of output."""
    return "narrow_tiles" if width <= NARROW else "whole_tiles"


@jit
def _slot_kernel(y_ptr: tl.tensor, x_source: tl.tensor, w_source: tl.tensor, bias_ptr: tl.tensor, index_ptr: tl.tensor,
                 samples: tl.tensor, tokens: tl.tensor, width: tl.tensor, depth: tl.tensor, slots: tl.tensor,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
                 BIAS: tl.constexpr) -> None:  # fmt: skip
    # Persistent; columns run fastest, so that programs that run together share rows of x in L2, and a sample's tiles
    # come one after the other, so that its weight stays there. A tile ends with its sample: what it reads beyond is
    # the next one's and is not written.
    across = tl.cdiv(width, BLOCK_N)
    per_sample = tl.cdiv(tokens, BLOCK_M)
    for tile in tl.range(tl.program_id(0), samples * per_sample * across, tl.num_programs(0)):
        col = tile % across * BLOCK_N
        place = tile // across
        sample = place // per_sample
        inner = place % per_sample * BLOCK_M
        slot = tl.load(index_ptr + sample).to(tl.int32)
        known = (slot >= 0) & (slot < slots)
        first = tl.where(known, slot, 0) * width + col
        row = sample * tokens + inner
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, depth, BLOCK_K):
            x = load_block(x_source, row, k, samples * tokens, depth, BLOCK_M, BLOCK_K, TMA)
            w = load_block(w_source, first, k, slots * width, depth, BLOCK_N, BLOCK_K, TMA)
            total = tl.dot(x, w.T, total)
        n = col + tl.arange(0, BLOCK_N)
        if BIAS:
            total += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        # A wrong index must be seen.
        total = tl.where(known, total, float("nan"))
        m = inner + tl.arange(0, BLOCK_M)
        at = (sample.to(tl.int64) * tokens + m)[:, None] * width + n[None, :]
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=(m < tokens)[:, None] & (n < width)[None, :])
