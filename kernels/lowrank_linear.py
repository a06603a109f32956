"""A dense layer and every sample's own low-rank branch in one product: y = x W^T + bias + M * s[i] * B[i] (A[i] x).

The branch beside the layer (lowrank_residual) reads x and y again and writes y again: on SD1.5's attention at batch 16
that alone is 6.8 GB a step, 1.6 ms at 4.3 TB/s. Here the block of x that the dense product has in shared memory also
meets A, and the branch is added while the sum is still in registers: no pass over activations is left. Punica (Chen et
al. 2023) and its successors keep the two apart; a picture's thousands of tokens of one adapter make joining them easy.
"""

from math import gcd

from torch import Tensor
from torch.nn import functional

from hueshift.kernels.checks import check_contiguous, check_device, check_dtype, check_shape
from hueshift.kernels.launch import Launch, block_descriptor, jit, multiprocessors, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.lowrank_residual import check_arguments, lowrank_residual
from hueshift.kernels.product import load_block, shape_class, tma_fits
from hueshift.kernels.tiles import blocks

KERNEL = "lowrank_linear"
# Beyond it the branch's own products cost more than the passes over activations that they save.
MAX_FUSED_RANK = 64


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    index: Tensor,
    scales: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Return y [N, T, out] of the dense layer plus each sample's branch, summed in fp32 and rounded once.

    x [N, T, in] contiguous, weight [out, in] and bias [out] contiguous, a, b, index, scales and mask as in
    lowrank_residual; one dtype (fp16 or bf16 on a GPU). A sample with index -1 gets the dense layer alone. Where tiles
    would mix samples (T no multiple of 128), columns are no multiple of 8 or the rank is over 64, the dense product and
    lowrank_residual run one after the other. CPU tensors take the reference, which is just that. Raises
    KernelArgumentError on what does not fit.
    """
    check_dense(x, weight, bias)
    if not on_gpu(x) or not fuses(x, weight, a, b):
        return reference(x, weight, bias, a, b, index, scales, mask)
    y = x.new_empty(*x.shape[:2], weight.shape[0])
    check_arguments(y, x, a, b, index, scales, mask)
    linear_launch(y, x, weight, bias, a, b, index, scales, mask).run()
    return y


def check_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise KernelArgumentError unless the dense layer's tensors fit each other."""
    check_shape("x", x, (None, None, None))
    check_shape("weight", weight, (None, x.shape[2]))
    vectors = [("weight", weight)]
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        vectors.append(("bias", bias))
    check_contiguous("x", x)
    for name, tensor in vectors:
        check_dtype(name, tensor, (x.dtype,))
        check_device(name, tensor, x.device)
        check_contiguous(name, tensor)


def fuses(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Tell whether the fused kernel takes these shapes."""
    rows = x.flatten(0, 1)
    whole = x.shape[1] > 0 and x.shape[1] % 128 == 0 and a.dim() == 3 and a.shape[1] <= MAX_FUSED_RANK
    steps = (x.shape[2], weight.shape[0], a.stride(0), b.stride(0))
    return whole and tma_fits(rows) and tma_fits(weight) and all(step % 8 == 0 for step in steps)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    index: Tensor,
    scales: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Run the dense product, then the branch: on a CPU in torch, on a GPU with lowrank_residual's kernel."""
    return lowrank_residual(functional.linear(x, weight, bias), x, a, b, index, scales, mask)


def linear_launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    index: Tensor,
    scales: Tensor,
    mask: Tensor | None,
    config: LaunchConfig | None = None,
) -> Launch:
    """Return the launch that fills `y`; `config` replaces the launch table's choice."""
    samples, tokens, depth = x.shape
    width, rank = weight.shape[0], a.shape[1]
    config = config or choose(y.device, KERNEL, shape_class(tokens, width))
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    rows = x.view(samples * tokens, depth)
    rank_vector = gcd(rank, 8)
    arguments = {
        "y_ptr": y,
        "x_source": block_descriptor(rows, (block_m, block_k)) if config["TMA"] else rows,
        "w_source": block_descriptor(weight, (block_n, block_k)) if config["TMA"] else weight,
        # Tensors must be passed even where their use is compiled out.
        "bias_ptr": y if bias is None else bias,
        "a_ptr": a,
        "b_ptr": b,
        "index_ptr": index,
        "scales_ptr": scales,
        "mask_ptr": scales if mask is None else mask,
        "rows": samples * tokens,
        "tokens": tokens,
        "slots": a.shape[0],
        "rank": rank // rank_vector,
        # Triton learns only of multiples of 16 by itself: divided here, multiplied back by a constant there.
        "width": width // 8,
        "depth": depth // 8,
        "a_slot": a.stride(0) // 8,
        "b_slot": b.stride(0) // 8,
    }
    constants = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA")}
    constants |= {
        # The tensor cores take sums of at least 16.
        "RANK": max(16, 1 << (rank - 1).bit_length()),
        "RANK_VECTOR": rank_vector,
        "BIAS": bias is not None,
        "MASKED": mask is not None,
    }
    count = blocks(samples * tokens, block_m) * blocks(width, block_n)
    grid = (min(count, multiprocessors(y.device) * config.programs_per_sm),)
    return Launch(_linear_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


@jit
def _linear_kernel(y_ptr: tl.tensor, x_source: tl.tensor, w_source: tl.tensor, bias_ptr: tl.tensor, a_ptr: tl.tensor,
                   b_ptr: tl.tensor, index_ptr: tl.tensor, scales_ptr: tl.tensor, mask_ptr: tl.tensor,
                   rows: tl.tensor, tokens: tl.tensor, slots: tl.tensor, rank: tl.tensor, width: tl.tensor,
                   depth: tl.tensor, a_slot: tl.tensor, b_slot: tl.tensor, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, RANK: tl.constexpr,
                   RANK_VECTOR: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr) -> None:  # fmt: skip
    # Persistent; columns run fastest, so that programs that run together share rows of x in L2. A tile's rows are of
    # one sample, so its A and B are of one slot. Every tile of columns shrinks x again: RANK columns beside BLOCK_N.
    width = width * 8
    depth = depth * 8
    rank = rank * RANK_VECTOR
    r = tl.arange(0, RANK)
    across = tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * across, tl.num_programs(0)):
        row = tile // across * BLOCK_M
        col = tile % across * BLOCK_N
        slot = tl.load(index_ptr + row // tokens).to(tl.int64)
        # Without an adapter no lane of A is read, and the branch is zero.
        ranks = tl.where((slot >= 0) & (slot < slots), rank, 0)
        a = a_ptr + slot * (a_slot * 8)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        shrunk = tl.zeros((BLOCK_M, RANK), tl.float32)
        for k in tl.range(0, depth, BLOCK_K):
            i = k + tl.arange(0, BLOCK_K)
            x = load_block(x_source, row, k, rows, depth, BLOCK_M, BLOCK_K, TMA)
            w = load_block(w_source, col, k, width, depth, BLOCK_N, BLOCK_K, TMA)
            factor = tl.load(a + r[:, None] * depth + i[None, :],
                             mask=(r < ranks)[:, None] & (i < depth)[None, :], other=0.0)  # fmt: skip
            total = tl.dot(x, w.T, total)
            shrunk = tl.dot(x, factor.T, shrunk)
        m = row + tl.arange(0, BLOCK_M)
        n = col + tl.arange(0, BLOCK_N)
        if ranks > 0:
            b = tl.load(b_ptr + slot * (b_slot * 8) + n[:, None] * rank + r[None, :],
                        mask=(n < width)[:, None] & (r < ranks)[None, :], other=0.0)  # fmt: skip
            scale = tl.zeros((BLOCK_M,), tl.float32) + tl.load(scales_ptr + slot)
            if MASKED:
                scale = scale * tl.load(mask_ptr + m, mask=m < rows, other=0.0)
            # Scaled before the product, in fp32, so that it can be summed onto what is there.
            total = tl.dot((shrunk * scale[:, None]).to(b.dtype), b.T, total)
        if BIAS:
            total += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        inside = (m < rows)[:, None] & (n < width)[None, :]
        tl.store(y_ptr + m.to(tl.int64)[:, None] * width + n[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)
