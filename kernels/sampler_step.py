"""Classifier-free guidance and one linear sampler update in a single pass, each sample with its own coefficients.

out = uncond + g (cond - uncond) (Ho and Salimans 2022); x' = a x + b out + c prev + d noise; prev' = e x + f out. DDIM,
Euler, DPM-Solver++ 2M and LCM are rows of coefficients, for epsilon and v prediction alike, so samples at different
steps of different samplers share one launch.
"""

import torch
from torch import Tensor

from hueshift.kernels.checks import (
    HALF_TYPES,
    INDEX_TYPES,
    check_apart,
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
)
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, jit, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.tiles import blocks

COEFFICIENTS = 6
NO_ROW = -1
STATE_TYPES = (torch.float32, torch.float64)


def sampler_step(
    x: Tensor,
    prev: Tensor,
    out: Tensor,
    cond_rows: Tensor,
    uncond_rows: Tensor,
    guidance: Tensor,
    coefficients: Tensor,
    noise: Tensor | None = None,
) -> None:
    """Update x and prev in place.

    x and prev [N, ...] fp32 (the latents and the previous step's data estimate), noise like x or None; out [M, ...] is
    the UNet's output for all rows of the batch, fp16, bf16 or fp32, and shares no memory with x or prev; cond_rows and
    uncond_rows [N] int32 or int64 say which of its rows belong to a sample (uncond -1 = no guidance); guidance [N] and
    coefficients [N, 6] = a, b, c, d, e, f fp32. All contiguous. Where c or d is 0, prev or noise is not read: a first
    step may leave prev uninitialised. Rows outside 0..M-1 are refused on a CPU; on a GPU they make the sample NaN. CPU
    tensors take the reference.
    Raises KernelArgumentError on what does not fit.
    """
    check_arguments(x, prev, out, cond_rows, uncond_rows, guidance, coefficients, noise)
    if not on_gpu(x):
        reference(x, prev, out, cond_rows, uncond_rows, guidance, coefficients, noise)
        return
    step_launch(x, prev, out, cond_rows, uncond_rows, guidance, coefficients, noise).run()


def check_arguments(
    x: Tensor,
    prev: Tensor,
    out: Tensor,
    cond_rows: Tensor,
    uncond_rows: Tensor,
    guidance: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
) -> None:
    """Raise KernelArgumentError unless the arguments fit each other."""
    check_dtype("x", x, STATE_TYPES if x.device.type != "cuda" else (torch.float32,))
    samples = x.shape[0] if x.dim() else -1
    if samples < 0:
        raise KernelArgumentError("x is a scalar (needed: [N, ...])")
    check_shape("prev", prev, tuple(x.shape))
    check_shape("out", out, (None, *x.shape[1:]))
    check_dtype("out", out, (*HALF_TYPES, torch.float32, x.dtype))
    check_shape("coefficients", coefficients, (samples, COEFFICIENTS))
    check_shape("guidance", guidance, (samples,))
    floats = [("prev", prev), ("guidance", guidance), ("coefficients", coefficients)]
    if noise is not None:
        check_shape("noise", noise, tuple(x.shape))
        floats.append(("noise", noise))
    for name, tensor in floats:
        check_dtype(name, tensor, (x.dtype,))
    for name, rows, low in (("cond_rows", cond_rows, 0), ("uncond_rows", uncond_rows, NO_ROW)):
        check_dtype(name, rows, INDEX_TYPES)
        check_shape(name, rows, (samples,))
        if rows.device.type == "cpu" and rows.numel() and not low <= int(rows.min()) <= int(rows.max()) < out.shape[0]:
            raise KernelArgumentError(f"{name} has {rows.tolist()} (allowed: {low}..{out.shape[0] - 1})")
    if noise is None and coefficients.device.type == "cpu" and bool((coefficients[:, 3] != 0).any()):
        raise KernelArgumentError("noise is None but a coefficient d is not 0 (needed: the noise of those samples)")
    check_apart("x", x, "prev", prev)
    # A row of out may be read after another sample has been written.
    check_apart("x", x, "out", out)
    check_apart("prev", prev, "out", out)
    check_dtype("uncond_rows", uncond_rows, (cond_rows.dtype,))
    for name, tensor in (*floats, ("x", x), ("out", out), ("cond_rows", cond_rows), ("uncond_rows", uncond_rows)):
        check_device(name, tensor, x.device)
        check_contiguous(name, tensor)


def reference(
    x: Tensor,
    prev: Tensor,
    out: Tensor,
    cond_rows: Tensor,
    uncond_rows: Tensor,
    guidance: Tensor,
    coefficients: Tensor,
    noise: Tensor | None = None,
) -> None:
    """Do the same with torch, in the dtype of x."""
    column = (-1, *[1] * (x.dim() - 1))
    guided = out[cond_rows.long()].to(x.dtype)
    uncond = out[uncond_rows.clamp(min=0).long()].to(x.dtype)
    with_guidance = (uncond_rows >= 0).view(column)
    guided = torch.where(with_guidance, uncond + guidance.view(column) * (guided - uncond), guided)
    a, b, c, d, e, f = (coefficients[:, i].view(column) for i in range(COEFFICIENTS))
    step = a * x + b * guided + torch.where(c != 0, c * prev, 0)
    if noise is not None:
        step = step + torch.where(d != 0, d * noise, 0)
    estimate = e * x + f * guided
    x.copy_(step)
    prev.copy_(estimate)


def step_launch(
    x: Tensor,
    prev: Tensor,
    out: Tensor,
    cond_rows: Tensor,
    uncond_rows: Tensor,
    guidance: Tensor,
    coefficients: Tensor,
    noise: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Launch:
    """Return the launch of one call; `config` replaces the launch table's choice."""
    config = config or choose(x.device, "sampler_step")
    samples = x.shape[0]
    size = x[0].numel() if samples else 0
    arguments = {
        "x_ptr": x,
        "prev_ptr": prev,
        "out_ptr": out,
        "cond_ptr": cond_rows,
        "uncond_ptr": uncond_rows,
        "guidance_ptr": guidance,
        "coefficients_ptr": coefficients,
        # A tensor must be passed even where the noise is compiled out.
        "noise_ptr": x if noise is None else noise,
        "size": size,
        "out_rows": out.shape[0],
    }
    constants = {"BLOCK": config["BLOCK"], "NOISE": noise is not None}
    grid = (blocks(size, config["BLOCK"]), samples)
    return Launch(_step_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


@jit
def _out_row(out_ptr: tl.tensor, row: tl.tensor, out_rows: tl.tensor, size: tl.tensor, at: tl.tensor) -> tl.tensor:
    # NaN where the row does not exist.
    mask = (at < size) & (row >= 0) & (row < out_rows)
    return tl.load(out_ptr + row * size + at, mask=mask, other=float("nan")).to(tl.float32)


@jit
def _step_kernel(x_ptr: tl.tensor, prev_ptr: tl.tensor, out_ptr: tl.tensor, cond_ptr: tl.tensor, uncond_ptr: tl.tensor,
                 guidance_ptr: tl.tensor, coefficients_ptr: tl.tensor, noise_ptr: tl.tensor, size: tl.tensor,
                 out_rows: tl.tensor, BLOCK: tl.constexpr, NOISE: tl.constexpr) -> None:  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    row = coefficients_ptr + sample * 6
    a = tl.load(row)
    b = tl.load(row + 1)
    c = tl.load(row + 2)
    d = tl.load(row + 3)
    e = tl.load(row + 4)
    f = tl.load(row + 5)
    uncond_row = tl.load(uncond_ptr + sample).to(tl.int64)
    here = sample * size + at
    # All reads that wait only for the row's numbers are asked for before the branch, which would hold them back.
    x = tl.load(x_ptr + here, mask=inside, other=0.0)
    # Masked by the coefficient: what is not used is not read, so it costs no bandwidth and may be NaN.
    prev = tl.load(prev_ptr + here, mask=at < tl.where(c == 0.0, 0, size), other=0.0)
    if NOISE:
        noise = tl.load(noise_ptr + here, mask=at < tl.where(d == 0.0, 0, size), other=0.0)
    out = _out_row(out_ptr, tl.load(cond_ptr + sample).to(tl.int64), out_rows, size, at)
    if uncond_row != -1:
        uncond = _out_row(out_ptr, uncond_row, out_rows, size, at)
        out = uncond + tl.load(guidance_ptr + sample) * (out - uncond)
    step = a * x + b * out + c * prev
    if NOISE:
        step += d * noise
    tl.store(x_ptr + here, step, mask=inside)
    tl.store(prev_ptr + here, e * x + f * out, mask=inside)
