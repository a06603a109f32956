"""GEGLU (Shazeer 2020): one half of a row times the GELU of its other half, in one pass.

The widest activations of a UNet: SD1.5's largest transformers hold 2,560 numbers a token here. In torch the GELU's
result is written and read once more, which makes five passes over half a row instead of three.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.checks import HALF_TYPES, REFERENCE_TYPES, check_contiguous, check_dtype, check_shape
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, jit, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.tiles import blocks

KERNEL = "gated_gelu"


def gated_gelu(x: Tensor) -> Tensor:
    """Return x[..., :w] * gelu(x[..., w:]) [N, T, w] for x [N, T, 2w] contiguous.

    GELU with the error function itself (Hendrycks and Gimpel 2016), no tanh in its place, as diffusers' GEGLU; in fp32
    (float64 for float64) and rounded once. fp16 or bf16 on a GPU. CPU tensors take the reference. Raises
    KernelArgumentError on what does not fit.
    """
    check_dtype("x", x, HALF_TYPES if x.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("x", x, (None, None, None))
    if x.shape[2] % 2:
        raise KernelArgumentError(f"x has {x.shape[2]} columns (needed: an even number, values and gates side by side)")
    check_contiguous("x", x)
    if not on_gpu(x):
        return reference(x)
    out = x.new_empty(*x.shape[:2], x.shape[2] // 2)
    gelu_launch(out, x).run()
    return out


def reference(x: Tensor) -> Tensor:
    """Do the same with torch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    value, gate = x.to(wide).chunk(2, dim=2)
    return (value * functional.gelu(gate)).to(x.dtype)


def gelu_launch(out: Tensor, x: Tensor, config: LaunchConfig | None = None) -> Launch:
    """Return the launch that fills `out` [N, T, w]; `config` replaces the launch table's choice."""
    config = config or choose(x.device, KERNEL)
    rows, width = out.shape[0] * out.shape[1], out.shape[2]
    vector = gcd(width, 8)
    # Triton learns only of multiples of 16 by itself: divided here, multiplied back by a constant there.
    arguments = {"out_ptr": out, "x_ptr": x, "rows": rows, "width": width // vector}
    constants = {"BLOCK_T": config["BLOCK_T"], "BLOCK_C": config["BLOCK_C"], "VECTOR": vector}
    grid = (blocks(rows, config["BLOCK_T"]) * blocks(width, config["BLOCK_C"]),)
    return Launch(_gelu_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


@jit
def _normal_share(z: tl.tensor) -> tl.tensor:
    # The share of a normal distribution below z, (1 + erf(z / sqrt(2))) / 2, by Abramowitz and Stegun 1964, 7.1.26: in
    # fp32 GELU is 4.2e-7 off at most, torch's 1.1e-6 because 1 + erf cancels. With tl.erf an element took 58
    # instructions for sm_90, longer than its bytes; now 30. 1 / s as rsqrt squared needs no scaling, s being 1 or more.
    r = tl.rsqrt(1.0 + 0.23164188 * tl.abs(z))
    t = r * r
    upper = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    upper = t * upper * tl.exp2(-0.7213475204 * z * z)
    return tl.where(z < 0.0, upper, 1.0 - upper)


@jit
def _gelu_kernel(out_ptr: tl.tensor, x_ptr: tl.tensor, rows: tl.tensor, width: tl.tensor, BLOCK_T: tl.constexpr,
                 BLOCK_C: tl.constexpr, VECTOR: tl.constexpr) -> None:  # fmt: skip
    # Columns run fastest, so that programs that run together read whole rows.
    width = width * VECTOR
    across = tl.cdiv(width, BLOCK_C)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    source = x_ptr + (row * 2 * width)[:, None] + col[None, :]
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    y = value * (gate * _normal_share(gate))
    tl.store(out_ptr + (row * width)[:, None] + col[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
