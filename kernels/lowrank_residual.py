"""Low-rank branches of a mixed batch: y += M * s[i] * B[i] (A[i] x), every sample with its own adapter i = index[n].

The unmerged form of LoRA (Hu et al. 2021) for batches that mix users, as in Punica (Chen et al. 2023); M is the mask of
localized attention-guided sampling. Few FLOPs, so launches and activation traffic decide: shrink (A) and expand (B) run
in one launch, or in two where a few tokens of many channels would leave most of the GPU idle.
"""

from math import gcd

import torch
from torch import Tensor

from hueshift.kernels.checks import (
    ALIGNMENT,
    HALF_TYPES,
    REFERENCE_TYPES,
    check_apart,
    check_contiguous,
    check_device,
    check_dtype,
    check_index,
    check_inner_contiguous,
    check_shape,
)
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, jit, multiprocessors, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.tiles import blocks

MAX_RANK = 128
# Below this many tokens in all, one program per block of tokens would leave multiprocessors idle.
FEW_TOKENS = 8192
SHRINK_STEPS = ("in_features", "a_slot", "x_sample", "x_token")
EXPAND_STEPS = ("out_features", "b_slot", "y_sample", "y_token")


def lowrank_residual(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, index: Tensor, scales: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Add each sample's low-rank branch to `y` in place and return it.

    y [N, T, out] and x [N, T, in] of one dtype (fp16 or bf16 on a GPU), last dimension packed; a [slots, R, in] and
    b [slots, out, R] of the same dtype, each slot packed, R at most 128 (smaller ranks padded with zeros); index [N]
    int32 or int64, -1 for a sample without adapter; scales [slots] fp32; mask [N, T] fp32 or None for ones. Sums in
    fp32. Samples with index -1, and tokens with mask 0, keep their bits. On a GPU an index outside -1..slots-1 counts
    as -1 (see checks.check_index). CPU tensors take the reference. Raises KernelArgumentError on what does not fit.
    """
    check_arguments(y, x, a, b, index, scales, mask)
    if not on_gpu(y):
        return reference(y, x, a, b, index, scales, mask)
    for launch in launches(y, x, a, b, index, scales, mask):
        launch.run()
    return y


def check_arguments(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, index: Tensor, scales: Tensor, mask: Tensor | None
) -> None:
    """Raise KernelArgumentError unless the arguments fit each other."""
    check_dtype("y", y, HALF_TYPES if y.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("y", y, (None, None, None))
    samples, tokens, out_features = y.shape
    check_shape("x", x, (samples, tokens, None))
    check_shape("a", a, (None, None, x.shape[2]))
    slots, rank, _ = a.shape
    if not 1 <= rank <= MAX_RANK:
        raise KernelArgumentError(f"a has rank {rank} (allowed: 1..{MAX_RANK})")
    check_shape("b", b, (slots, out_features, rank))
    for name, tensor, dims in (("y", y, 1), ("x", x, 1), ("a", a, 2), ("b", b, 2)):
        check_dtype(name, tensor, (y.dtype,))
        check_inner_contiguous(name, tensor, dims)
    check_index("index", index, -1, slots)
    check_shape("index", index, (samples,))
    floats = (torch.float32, torch.float64) if y.dtype == torch.float64 else (torch.float32,)
    check_dtype("scales", scales, floats)
    check_shape("scales", scales, (slots,))
    check_contiguous("scales", scales)
    if mask is not None:
        check_dtype("mask", mask, floats)
        check_shape("mask", mask, (samples, tokens))
        check_contiguous("mask", mask)
    for name, tensor in (("x", x), ("a", a), ("b", b), ("index", index), ("scales", scales)):
        check_device(name, tensor, y.device)
    if mask is not None:
        check_device("mask", mask, y.device)
    # Each program reads and writes its own tokens: where two lie on the same memory, one would undo the other.
    if any(y.shape[axis] > 1 and y.stride(axis) < out_features for axis in (0, 1)):
        raise KernelArgumentError(f"y has strides {list(y.stride())} (needed: tokens apart from each other)")
    # Programs that share tokens read x after others have written y. Views that interleave are taken at their word.
    if y.is_contiguous() and x.is_contiguous():
        check_apart("y", y, "x", x)


def reference(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, index: Tensor, scales: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Do the same with torch, in float32, or in float64 for float64 tensors."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    chosen = index.clamp(min=0).long()
    shrunk = torch.einsum("nti,nri->ntr", x.to(wide), a[chosen].to(wide))
    change = torch.einsum("ntr,nor->nto", shrunk, b[chosen].to(wide))
    factor = (scales.to(wide)[chosen] * (index >= 0))[:, None, None]
    if mask is not None:
        factor = factor * mask.to(wide)[:, :, None]
    change = change * factor
    return y.copy_(torch.where(change == 0, y.to(wide), y.to(wide) + change))


def launches(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    index: Tensor,
    scales: Tensor,
    mask: Tensor | None,
    config: LaunchConfig | None = None,
) -> list[Launch]:
    """Return the launches of one call; `config` replaces the launch table's choice."""
    samples, tokens, out_features = y.shape
    config = config or choose(
        y.device, "lowrank_residual", "few_tokens" if samples * tokens < FEW_TOKENS else "many_tokens"
    )
    rank = a.shape[1]
    # The tensor cores take sums of at least 16.
    padded = max(16, 1 << (rank - 1).bit_length())
    steps = {
        "in_features": x.shape[2],
        "out_features": out_features,
        "a_slot": a.stride(0),
        "b_slot": b.stride(0),
        "x_sample": x.stride(0),
        "x_token": x.stride(1),
        "y_sample": y.stride(0),
        "y_token": y.stride(1),
    }
    # Triton learns only of multiples of 16 by itself, and slabs are multiples of 8 elements: one 16-byte load.
    aligned = all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in (y, x, a, b))
    vector = 8 if aligned and all(step % 8 == 0 for step in steps.values()) else 1
    divided = {name: step // vector for name, step in steps.items()}
    rank_vector = gcd(rank, 8)
    shared = {"index_ptr": index, "tokens": tokens, "rank": rank // rank_vector, "slots": a.shape[0]}
    shrink = {"x_ptr": x, "a_ptr": a, **{name: divided[name] for name in SHRINK_STEPS}}
    # A tensor must be passed even where the mask is compiled out.
    factors = {"scales_ptr": scales, "mask_ptr": scales if mask is None else mask}
    expand = {"y_ptr": y, "b_ptr": b, **factors, **{name: divided[name] for name in EXPAND_STEPS}}
    sizes = {"VECTOR": vector, "RANK_VECTOR": rank_vector, "RANK": padded, "BLOCK_T": config["BLOCK_T"]}
    inner = {"BLOCK_I": config["BLOCK_I"]}
    outer = {"BLOCK_O": config["BLOCK_O"], "MASKED": mask is not None}
    token_blocks = samples * blocks(tokens, config["BLOCK_T"])
    # Few tokens: several programs share them, each with a slice of the features, until the GPU is full.
    sharing = max(1, multiprocessors(y.device) * config.programs_per_sm // max(1, token_blocks))
    grid = (token_blocks, min(sharing, blocks(out_features, config["BLOCK_O"])))
    warps, stages = config.num_warps, config.num_stages
    if config["FUSED"]:
        together = {**shared, **shrink, **expand}
        return [Launch(_residual_kernel, grid, together, {**sizes, **inner, **outer}, warps, stages)]
    splits = min(sharing, blocks(x.shape[2], config["BLOCK_I"]))
    shrunk = torch.empty(splits, samples, tokens, padded, dtype=torch.float32, device=y.device)
    between = {"shrunk_ptr": shrunk, "samples": samples, **shared}
    return [
        Launch(_shrink_kernel, (token_blocks, splits), {**between, **shrink}, {**sizes, **inner}, warps, stages),
        Launch(_expand_kernel, grid, {**between, **expand}, {**sizes, **outer, "IN_SPLITS": splits}, warps, stages),
    ]


@jit
def _shrink(x_ptr: tl.tensor, a_ptr: tl.tensor, token: tl.tensor, tokens: tl.tensor, x_token: tl.tensor,
            begin: tl.tensor, end: tl.tensor, in_features: tl.tensor, rank: tl.tensor, BLOCK_T: tl.constexpr,
            BLOCK_I: tl.constexpr, RANK: tl.constexpr) -> tl.tensor:  # fmt: skip
    # x A^T over input features begin..end, [BLOCK_T, RANK] fp32.
    r = tl.arange(0, RANK)
    shrunk = tl.zeros((BLOCK_T, RANK), tl.float32)
    for start in tl.range(begin, end, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i < end
        x = tl.load(x_ptr + token[:, None] * x_token + i[None, :],
                    mask=(token < tokens)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        a = tl.load(a_ptr + r[:, None] * in_features + i[None, :],
                    mask=(r < rank)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        shrunk = tl.dot(x, a.T, shrunk)
    return shrunk


@jit
def _expand(y_ptr: tl.tensor, b_ptr: tl.tensor, shrunk: tl.tensor, factor: tl.tensor, token: tl.tensor,
            tokens: tl.tensor, y_token: tl.tensor, out_features: tl.tensor, rank: tl.tensor,
            BLOCK_O: tl.constexpr, RANK: tl.constexpr) -> None:  # fmt: skip
    # y += factor * shrunk B^T, over the output blocks of this program.
    r = tl.arange(0, RANK)
    for block in tl.range(tl.program_id(1), tl.cdiv(out_features, BLOCK_O), tl.num_programs(1)):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        b = tl.load(b_ptr + o[:, None] * rank + r[None, :],
                    mask=(o < out_features)[:, None] & (r < rank)[None, :], other=0.0)  # fmt: skip
        change = tl.dot(shrunk.to(b.dtype), b.T) * factor[:, None]
        at = y_ptr + token[:, None] * y_token + o[None, :]
        inside = (token < tokens)[:, None] & (o < out_features)[None, :]
        y = tl.load(at, mask=inside, other=0.0)
        # Where nothing changes y keeps its bits: -0.0 + 0.0 would turn into +0.0.
        tl.store(at, tl.where(change == 0.0, y, (y.to(tl.float32) + change).to(y.dtype)), mask=inside)


@jit
def _factor(scales_ptr: tl.tensor, mask_ptr: tl.tensor, slot: tl.tensor, sample: tl.tensor, token: tl.tensor,
            tokens: tl.tensor, BLOCK_T: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:  # fmt: skip
    factor = tl.zeros((BLOCK_T,), tl.float32) + tl.load(scales_ptr + slot)
    if MASKED:
        factor = factor * tl.load(mask_ptr + sample * tokens + token, mask=token < tokens, other=0.0)
    return factor


@jit
def _place(index_ptr: tl.tensor, tokens: tl.tensor, BLOCK_T: tl.constexpr) -> tl.tensor:
    # The sample, its slot and the tokens of this program. The last tokens come first: the dense product before this
    # launch has just written them, and of SD1.5's largest x and y (42 MB each at batch 16) L2 keeps the end only.
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (place // token_blocks).to(tl.int64)
    slot = tl.load(index_ptr + sample).to(tl.int64)
    return sample, slot, place % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)


@jit
def _residual_kernel(index_ptr: tl.tensor, tokens: tl.tensor, rank: tl.tensor, slots: tl.tensor,
                     x_ptr: tl.tensor, a_ptr: tl.tensor, in_features: tl.tensor, a_slot: tl.tensor,
                     x_sample: tl.tensor, x_token: tl.tensor, y_ptr: tl.tensor, b_ptr: tl.tensor,
                     scales_ptr: tl.tensor, mask_ptr: tl.tensor, out_features: tl.tensor, b_slot: tl.tensor,
                     y_sample: tl.tensor, y_token: tl.tensor, VECTOR: tl.constexpr, RANK_VECTOR: tl.constexpr,
                     RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
                     MASKED: tl.constexpr) -> None:  # fmt: skip
    # Both products in one launch: the shrunk tokens never leave registers. Programs that share tokens redo the shrink.
    sample, slot, token = _place(index_ptr, tokens, BLOCK_T)
    if (slot >= 0) & (slot < slots):
        x = x_ptr + sample * (x_sample * VECTOR)
        a = a_ptr + slot * (a_slot * VECTOR)
        width = in_features * VECTOR
        shrunk = _shrink(
            x, a, token, tokens, x_token * VECTOR, 0, width, width, rank * RANK_VECTOR, BLOCK_T, BLOCK_I, RANK
        )
        factor = _factor(scales_ptr, mask_ptr, slot, sample, token, tokens, BLOCK_T, MASKED)
        y = y_ptr + sample * (y_sample * VECTOR)
        b = b_ptr + slot * (b_slot * VECTOR)
        _expand(
            y,
            b,
            shrunk,
            factor,
            token,
            tokens,
            y_token * VECTOR,
            out_features * VECTOR,
            rank * RANK_VECTOR,
            BLOCK_O,
            RANK,
        )


@jit
def _shrink_kernel(shrunk_ptr: tl.tensor, samples: tl.tensor, index_ptr: tl.tensor, tokens: tl.tensor,
                   rank: tl.tensor, slots: tl.tensor, x_ptr: tl.tensor, a_ptr: tl.tensor, in_features: tl.tensor,
                   a_slot: tl.tensor, x_sample: tl.tensor, x_token: tl.tensor, VECTOR: tl.constexpr,
                   RANK_VECTOR: tl.constexpr, RANK: tl.constexpr, BLOCK_T: tl.constexpr,
                   BLOCK_I: tl.constexpr) -> None:  # fmt: skip
    # One slice of the input features; slices are summed by the expand kernel, in a fixed order.
    sample, slot, token = _place(index_ptr, tokens, BLOCK_T)
    if (slot >= 0) & (slot < slots):
        x = x_ptr + sample * (x_sample * VECTOR)
        a = a_ptr + slot * (a_slot * VECTOR)
        width = in_features * VECTOR
        slice_width = tl.cdiv(tl.cdiv(width, BLOCK_I), tl.num_programs(1)) * BLOCK_I
        begin = tl.program_id(1) * slice_width
        end = tl.minimum(begin + slice_width, width)
        shrunk = _shrink(
            x, a, token, tokens, x_token * VECTOR, begin, end, width, rank * RANK_VECTOR, BLOCK_T, BLOCK_I, RANK
        )
        at = ((tl.program_id(1) * samples + sample) * tokens + token)[:, None] * RANK + tl.arange(0, RANK)[None, :]
        tl.store(shrunk_ptr + at, shrunk, mask=(token < tokens)[:, None])


@jit
def _expand_kernel(shrunk_ptr: tl.tensor, samples: tl.tensor, index_ptr: tl.tensor, tokens: tl.tensor,
                   rank: tl.tensor, slots: tl.tensor, y_ptr: tl.tensor, b_ptr: tl.tensor, scales_ptr: tl.tensor,
                   mask_ptr: tl.tensor, out_features: tl.tensor, b_slot: tl.tensor, y_sample: tl.tensor,
                   y_token: tl.tensor, VECTOR: tl.constexpr, RANK_VECTOR: tl.constexpr, RANK: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, MASKED: tl.constexpr,
                   IN_SPLITS: tl.constexpr) -> None:  # fmt: skip
    sample, slot, token = _place(index_ptr, tokens, BLOCK_T)
    if (slot >= 0) & (slot < slots):
        shrunk = tl.zeros((BLOCK_T, RANK), tl.float32)
        for split in tl.range(IN_SPLITS):
            at = ((split * samples + sample) * tokens + token)[:, None] * RANK + tl.arange(0, RANK)[None, :]
            shrunk += tl.load(shrunk_ptr + at, mask=(token < tokens)[:, None], other=0.0)
        factor = _factor(scales_ptr, mask_ptr, slot, sample, token, tokens, BLOCK_T, MASKED)
        y = y_ptr + sample * (y_sample * VECTOR)
        b = b_ptr + slot * (b_slot * VECTOR)
        _expand(
            y,
            b,
            shrunk,
            factor,
            token,
            tokens,
            y_token * VECTOR,
            out_features * VECTOR,
            rank * RANK_VECTOR,
            BLOCK_O,
            RANK,
        )
