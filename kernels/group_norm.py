"""Group norm of channels_last pictures, with what stands around it in a UNet: a shift before, per-sample weights, SiLU.

y = silu(norm(x + shift) * weight + bias), norms over groups of channels (Wu and He 2018). torch's CUDA group norm knows
only the other memory layout, so in a channels_last network it costs two transposing copies beside its own passes; here
it is two reads and a write. A shift that is the same for all pixels moves means and no variances, so it costs nothing:
the time embedding and the bias of the convolution before come as one. Weights of each sample's own slot are the
factored plan's norms (SVDiff, Han et al. 2023).

Small pictures take one launch, a program for each group. Others take three: means and squared deviations of each
channel in chunks of pixels, from these one factor and one addend for each channel of a sample, and the pass that
applies them. Sums are of differences from a chunk's first pixel, in fp32: a mean far from zero costs no digits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.checks import (
    HALF_TYPES,
    MAX_ELEMENTS,
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

KERNEL = "group_norm"
# Up to here a group's pixels (SD1.5: 80 channels of 256) stay in a multiprocessor's L1 between two passes.
FEW_PIXELS = 256
# What one program combines: more would not fit in its registers. An autoencoder's pictures have longer chunks instead.
MOST_CHUNKS = 512
CLASSES = ("few_pixels", "many_pixels")


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    index: Tensor | None = None,
    shift: Tensor | None = None,
    shift_bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Return y [N, C, h, w], channels_last, = norm(x + shift + shift_bias) * weight + bias, through SiLU if asked.

    x [N, C, h, w] channels_last; bias [C], shift [N, C] and shift_bias [C] of its dtype (fp16 or bf16 on a GPU). weight
    is [C] of that dtype, or rows [slots, C] fp32 of any slot stride with index [N] (int32 or int64): sample n has the
    weights of slot index[n]. Statistics and arithmetic in fp32, rounded once. On a GPU a wrong index gives that sample
    NaN (see checks.check_index). CPU tensors take the reference. Raises KernelArgumentError on what does not fit.
    """
    check_arguments(x, weight, bias, groups, eps, index, shift, shift_bias)
    # A picture without pixels has no first one, which the kernel would read.
    if not on_gpu(x) or not x.numel():
        return reference(x, weight, bias, groups, eps, index=index, shift=shift, shift_bias=shift_bias, silu=silu)
    y = torch.empty_like(x)
    for launch in launches(y, x, weight, bias, groups, eps, index, shift, shift_bias, silu=silu):
        launch.run()
    return y


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    index: Tensor | None,
    shift: Tensor | None,
    shift_bias: Tensor | None,
) -> None:
    """Raise KernelArgumentError unless the arguments fit each other."""
    check_dtype("x", x, HALF_TYPES if x.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("x", x, (None, None, None, None))
    samples, channels = x.shape[:2]
    if x.numel() and not x.is_contiguous(memory_format=torch.channels_last):
        raise KernelArgumentError(f"x has strides {list(x.stride())} (needed: channels_last)")
    if x.shape[1:].numel() > MAX_ELEMENTS:
        raise KernelArgumentError(f"x has {x.shape[1:].numel()} elements a sample (allowed: {MAX_ELEMENTS})")
    if groups < 1 or channels % groups or not channels:
        raise KernelArgumentError(f"{groups} groups of {channels} channels (needed: a divisor of the channels)")
    if not eps >= 0:
        raise KernelArgumentError(f"eps is {eps} (needed: 0 or more)")
    small = [
        ("bias", bias, (channels,)),
        ("shift_bias", shift_bias, (channels,)),
        ("shift", shift, (samples, channels)),
    ]
    for name, tensor, shape in small:
        if tensor is not None:
            check_dtype(name, tensor, (x.dtype,))
            check_shape(name, tensor, shape)
            check_contiguous(name, tensor)
            check_device(name, tensor, x.device)
    check_device("weight", weight, x.device)
    check_inner_contiguous("weight", weight, 1)
    if index is None:
        check_dtype("weight", weight, (x.dtype,))
        check_shape("weight", weight, (channels,))
        return
    check_dtype("weight", weight, (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,))
    check_shape("weight", weight, (None, channels))
    check_index("index", index, 0, weight.shape[0])
    check_shape("index", index, (samples,))
    check_device("index", index, x.device)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    index: Tensor | None = None,
    shift: Tensor | None = None,
    shift_bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Do the same with torch, in float32, or in float64 for float64 tensors, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = x.to(wide)
    for part in (shift, None if shift_bias is None else shift_bias[None]):
        value = value if part is None else value + part.to(wide)[:, :, None, None]
    rows = weight[None] if index is None else weight[index.long()]
    # Not torch.nn.functional's, which refuses groups of one value.
    y = torch.group_norm(value, groups, None, None, eps) if value.numel() else value
    y = y * rows.to(wide)[:, :, None, None] + bias.to(wide)[None, :, None, None]
    y = functional.silu(y) if silu else y
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def launches(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    index: Tensor | None,
    shift: Tensor | None,
    shift_bias: Tensor | None,
    *,
    silu: bool,
    config: LaunchConfig | None = None,
) -> list[Launch]:
    """Return the launches of one call, in order; `config` replaces the launch table's choice."""
    samples, channels, height, width = x.shape
    pixels = height * width
    config = config or choose(x.device, KERNEL, shape_class(pixels))
    inputs = {
        "weight_ptr": weight,
        "bias_ptr": bias,
        # Tensors must be passed even where their use is compiled out.
        "index_ptr": x if index is None else index,
        "shift_ptr": x if shift is None else shift,
        "shift_bias_ptr": x if shift_bias is None else shift_bias,
        "slots": 1 if index is None else weight.shape[0],
        "slot_stride": 0 if index is None else weight.stride(0),
        "pixels": pixels,
        "channels": channels,
        "eps": eps,
    }
    group = channels // groups
    # A constant, so that the compiler knows which channels of a group begin on a 16-byte boundary.
    grouped = {
        "INDEXED": index is not None,
        "SHIFTED": shift is not None,
        "SHIFT_BIAS": shift_bias is not None,
        "GROUP": group,
        "PADDED": 1 << (group - 1).bit_length(),
    }
    if "CHUNK" not in config.constants:
        constants = {**grouped, "SILU": silu, "BLOCK_P": config["BLOCK_P"]}
        whole = {"y_ptr": y, "x_ptr": x, **inputs}
        return [Launch(_norm_kernel, (groups, samples), whole, constants, config.num_warps, config.num_stages)]
    return _in_three(y, x, groups, inputs, grouped, silu, config)


def _in_three(
    y: Tensor,
    x: Tensor,
    groups: int,
    inputs: dict[str, Any],
    grouped: dict[str, Any],
    silu: bool,
    config: LaunchConfig,
) -> list[Launch]:
    samples, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    chunk = config["CHUNK"]
    while blocks(pixels, chunk) > MOST_CHUNKS:
        chunk *= 2
    chunks, columns = blocks(pixels, chunk), blocks(channels, config["BLOCK_C"])
    partial = torch.empty(samples, 2, chunks, channels, dtype=torch.float32, device=x.device)
    factors = torch.empty(samples, 2, channels, dtype=torch.float32, device=x.device)
    tile = {"BLOCK_P": config["BLOCK_P"], "BLOCK_C": config["BLOCK_C"]}
    sizes = {"pixels": pixels, "channels": channels}
    chunked = {"CHUNK": chunk}
    measured = {"partial_ptr": partial, "x_ptr": x, **sizes}
    combined = {"factors_ptr": factors, "partial_ptr": partial, **inputs}
    many = {**grouped, **chunked, "CHUNKS": 1 << (chunks - 1).bit_length()}
    applied = {"y_ptr": y, "x_ptr": x, "factors_ptr": factors, **sizes}
    whole_pass = (blocks(pixels, config["BLOCK_P"]), columns, samples)
    warps = config.num_warps
    return [
        Launch(_moments_kernel, (chunks, columns, samples), measured, {**tile, **chunked}, warps, config.num_stages),
        Launch(_factors_kernel, (groups, samples), combined, many, 4, 1),
        Launch(_apply_kernel, whole_pass, applied, {**tile, "SILU": silu}, warps, 1),
    ]


def shape_class(pixels: int) -> str:
    """Return the launch table's class for pictures of so many pixels."""
    return "few_pixels" if pixels <= FEW_PIXELS else "many_pixels"


@jit
def _moments(base: tl.tensor, channels: tl.tensor, c: tl.tensor, inside: tl.tensor, begin: tl.tensor, end: tl.tensor,
             BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr) -> tl.tensor:  # fmt: skip
    # Mean and summed squared deviations of each channel over pixels begin..end.
    first = tl.load(base + begin * channels + c, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        kept = (p < end)[:, None] & inside[None, :]
        x = tl.load(base + p[:, None] * channels + c[None, :], mask=kept, other=0.0)
        difference = tl.where(kept, x.to(tl.float32) - first[None, :], 0.0)
        sums += difference
        squares += difference * difference
    total = tl.sum(sums, 0)
    mean = total / (end - begin)
    return first + mean, tl.maximum(tl.sum(squares, 0) - total * mean, 0.0)


@jit
def _shift(shift_ptr: tl.tensor, shift_bias_ptr: tl.tensor, sample: tl.tensor, channels: tl.tensor, c: tl.tensor,
           inside: tl.tensor, PADDED: tl.constexpr, SHIFTED: tl.constexpr,
           SHIFT_BIAS: tl.constexpr) -> tl.tensor:  # fmt: skip
    shift = tl.zeros((PADDED,), tl.float32)
    if SHIFTED:
        shift += tl.load(shift_ptr + sample * channels + c, mask=inside, other=0.0).to(tl.float32)
    if SHIFT_BIAS:
        shift += tl.load(shift_bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return shift


@jit
def _factors(weight_ptr: tl.tensor, bias_ptr: tl.tensor, index_ptr: tl.tensor, slots: tl.tensor,
             slot_stride: tl.tensor, sample: tl.tensor, c: tl.tensor, inside: tl.tensor, shift: tl.tensor,
             mean: tl.tensor, variance: tl.tensor, eps: tl.tensor, INDEXED: tl.constexpr) -> tl.tensor:  # fmt: skip
    # What every pixel of a channel is multiplied with, and what is added then.
    if INDEXED:
        slot = tl.load(index_ptr + sample).to(tl.int64)
        known = (slot >= 0) & (slot < slots)
        weight = tl.load(weight_ptr + slot * slot_stride + c, mask=inside & known, other=float("nan"))
    else:
        weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    factor = weight.to(tl.float32) * tl.rsqrt(variance + eps)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return factor, bias + (shift - mean) * factor


@jit
def _write(y_ptr: tl.tensor, x_ptr: tl.tensor, at: tl.tensor, kept: tl.tensor, factor: tl.tensor, addend: tl.tensor,
           SILU: tl.constexpr) -> None:  # fmt: skip
    x = tl.load(x_ptr + at, mask=kept, other=0.0)
    y = x.to(tl.float32) * factor[None, :] + addend[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + at, y.to(x.dtype), mask=kept)


@jit
def _norm_kernel(y_ptr: tl.tensor, x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, index_ptr: tl.tensor,
                 shift_ptr: tl.tensor, shift_bias_ptr: tl.tensor, slots: tl.tensor, slot_stride: tl.tensor,
                 pixels: tl.tensor, channels: tl.tensor, eps: tl.tensor, INDEXED: tl.constexpr, SHIFTED: tl.constexpr,
                 SHIFT_BIAS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr,
                 BLOCK_P: tl.constexpr) -> None:  # fmt: skip
    # One group of one sample.
    sample = tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, PADDED) < GROUP
    c = tl.program_id(0) * GROUP + tl.arange(0, PADDED)
    start = sample * pixels * channels
    shift = _shift(shift_ptr, shift_bias_ptr, sample, channels, c, inside, PADDED, SHIFTED, SHIFT_BIAS)
    means, squares = _moments(x_ptr + start, channels, c, inside, 0, pixels, BLOCK_P, PADDED)
    means = tl.where(inside, means + shift, 0.0)
    mean = tl.sum(means, 0) / GROUP
    apart = tl.where(inside, means - mean, 0.0)
    variance = (tl.sum(tl.where(inside, squares, 0.0), 0) / pixels + tl.sum(apart * apart, 0)) / GROUP
    factor, addend = _factors(weight_ptr, bias_ptr, index_ptr, slots, slot_stride, sample, c, inside, shift, mean,
                              variance, eps, INDEXED)  # fmt: skip
    for begin in tl.range(0, pixels, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        at = start + p[:, None] * channels + c[None, :]
        _write(y_ptr, x_ptr, at, (p < pixels)[:, None] & inside[None, :], factor, addend, SILU)


@jit
def _moments_kernel(partial_ptr: tl.tensor, x_ptr: tl.tensor, pixels: tl.tensor, channels: tl.tensor,
                    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr) -> None:  # fmt: skip
    chunk = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, pixels)
    mean, squares = _moments(x_ptr + sample * pixels * channels, channels, c, c < channels, begin, end, BLOCK_P,
                             BLOCK_C)  # fmt: skip
    chunks = tl.num_programs(0)
    row = partial_ptr + (sample * 2 * chunks + chunk) * channels + c
    tl.store(row, mean, mask=c < channels)
    tl.store(row + chunks * channels, squares, mask=c < channels)


@jit
def _factors_kernel(factors_ptr: tl.tensor, partial_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
                    index_ptr: tl.tensor, shift_ptr: tl.tensor, shift_bias_ptr: tl.tensor, slots: tl.tensor,
                    slot_stride: tl.tensor, pixels: tl.tensor, channels: tl.tensor, eps: tl.tensor,
                    INDEXED: tl.constexpr, SHIFTED: tl.constexpr, SHIFT_BIAS: tl.constexpr, GROUP: tl.constexpr,
                    PADDED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr) -> None:  # fmt: skip
    # Chan et al. 1979: deviations of parts add up, with those of the parts' means from the whole's.
    sample = tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, PADDED) < GROUP
    c = tl.program_id(0) * GROUP + tl.arange(0, PADDED)
    chunks = tl.cdiv(pixels, CHUNK)
    k = tl.arange(0, CHUNKS)
    kept = (k < chunks)[:, None] & inside[None, :]
    at = partial_ptr + (sample * 2 * chunks + k[:, None]) * channels + c[None, :]
    means = tl.load(at, mask=kept, other=0.0)
    squares = tl.load(at + chunks * channels, mask=kept, other=0.0)
    shift = _shift(shift_ptr, shift_bias_ptr, sample, channels, c, inside, PADDED, SHIFTED, SHIFT_BIAS)
    means = tl.where(kept, means + shift[None, :], 0.0)
    counts = tl.maximum(tl.minimum(pixels - k * CHUNK, CHUNK), 0).to(tl.float32)[:, None]
    whole = (pixels * GROUP).to(tl.float32)
    mean = tl.sum(tl.sum(means * counts, 0), 0) / whole
    apart = tl.where(kept, means - mean, 0.0)
    variance = tl.sum(tl.sum(squares + counts * apart * apart, 0), 0) / whole
    factor, addend = _factors(weight_ptr, bias_ptr, index_ptr, slots, slot_stride, sample, c, inside, shift, mean,
                              variance, eps, INDEXED)  # fmt: skip
    row = factors_ptr + sample * 2 * channels + c
    tl.store(row, factor, mask=inside)
    tl.store(row + channels, addend, mask=inside)


@jit
def _apply_kernel(y_ptr: tl.tensor, x_ptr: tl.tensor, factors_ptr: tl.tensor, pixels: tl.tensor, channels: tl.tensor,
                  BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr) -> None:  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = factors_ptr + sample * 2 * channels + c
    factor = tl.load(row, mask=c < channels, other=0.0)
    addend = tl.load(row + channels, mask=c < channels, other=0.0)
    at = sample * pixels * channels + p[:, None] * channels + c[None, :]
    _write(y_ptr, x_ptr, at, (p < pixels)[:, None] & (c < channels)[None, :], factor, addend, SILU)
