"""Two activations and a bias for every channel, summed in one pass: x + y + bias.

The end of every resnet (the skip, and the bias of its last convolution) and of every attention and feed-forward. As two
sums in torch x + y is written and read once more: five passes over activations instead of three.
"""

from math import gcd

import torch
from torch import Tensor

from hueshift.kernels.checks import (
    HALF_TYPES,
    REFERENCE_TYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
)
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, jit, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.tiles import blocks

KERNEL = "residual_add"


def residual_add(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x + y + bias in x's layout, summed in fp32 and rounded once (float64 for float64).

    x and y of one shape: [N, C, h, w] channels_last, or [..., C] contiguous with any other number of dimensions; bias
    [C] contiguous or None. One dtype (fp16 or bf16 on a GPU). CPU tensors take the reference. Raises
    KernelArgumentError on what does not fit.
    """
    check_arguments(x, y, bias)
    if not on_gpu(x):
        return reference(x, y, bias)
    out = torch.empty_like(x, memory_format=packed_format(x))
    add_launch(out, x, y, bias).run()
    return out


def check_arguments(x: Tensor, y: Tensor, bias: Tensor | None) -> None:
    """Raise KernelArgumentError unless the arguments fit each other."""
    if not x.dim():
        raise KernelArgumentError("x is a scalar (needed: [..., C] or [N, C, h, w])")
    check_dtype("x", x, HALF_TYPES if x.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("y", y, tuple(x.shape))
    check_packed("x", x)
    check_packed("y", y)
    others = [("y", y)]
    if bias is not None:
        check_shape("bias", bias, (channels(x),))
        check_contiguous("bias", bias)
        others.append(("bias", bias))
    for name, tensor in others:
        check_dtype(name, tensor, (x.dtype,))
        check_device(name, tensor, x.device)


def check_packed(name: str, tensor: Tensor) -> None:
    """Raise KernelArgumentError unless channels lie side by side and nothing lies between the elements."""
    if not tensor.is_contiguous(memory_format=packed_format(tensor)):
        needed = "channels_last" if tensor.dim() == 4 else "contiguous"
        raise KernelArgumentError(f"{name} has strides {list(tensor.stride())} (needed: {needed})")


def packed_format(tensor: Tensor) -> torch.memory_format:
    """Return the layout in which channels are innermost: four dimensions are pictures [N, C, h, w]."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def channels(tensor: Tensor) -> int:
    """Return C of [N, C, h, w] or [..., C]."""
    return tensor.shape[1] if tensor.dim() == 4 else tensor.shape[-1]


def reference(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do the same with torch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide) + y.to(wide)
    if bias is not None:
        total = total + (bias.to(wide)[:, None, None] if x.dim() == 4 else bias.to(wide))
    return total.to(x.dtype).contiguous(memory_format=packed_format(x))


def add_launch(out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, config: LaunchConfig | None = None) -> Launch:
    """Return the launch that fills `out`, laid out as x and y; `config` replaces the launch table's choice."""
    config = config or choose(x.device, KERNEL)
    width = channels(x)
    vector = gcd(width, 8)
    arguments = {
        "out_ptr": out,
        "x_ptr": x,
        "y_ptr": y,
        # A tensor must be passed even where the bias is compiled out.
        "bias_ptr": x if bias is None else bias,
        # Triton learns only of multiples of 16 by itself: divided here, multiplied back by a constant there.
        "size": x.numel() // vector,
        "width": width // vector,
    }
    constants = {"BLOCK": config["BLOCK"], "VECTOR": vector, "BIAS": bias is not None}
    return Launch(
        _add_kernel, (blocks(x.numel(), config["BLOCK"]),), arguments, constants, config.num_warps, config.num_stages
    )


@jit
def _add_kernel(out_ptr: tl.tensor, x_ptr: tl.tensor, y_ptr: tl.tensor, bias_ptr: tl.tensor, size: tl.tensor,
                width: tl.tensor, BLOCK: tl.constexpr, VECTOR: tl.constexpr, BIAS: tl.constexpr) -> None:  # fmt: skip
    # Elements in the order of memory, so no lane is idle whatever the width. Only a program's start needs 64 bits.
    width = width * VECTOR
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < (size - start // VECTOR) * VECTOR
    x = tl.load(x_ptr + start + lane, mask=inside, other=0.0)
    y = tl.load(y_ptr + start + lane, mask=inside, other=0.0)
    total = x.to(tl.float32) + y.to(tl.float32)
    if BIAS:
        # Written as a difference, of which the compiler sees that eight channels follow each other; of % it does not.
        first = (start - start // width * width).to(tl.int32)
        channel = first + lane - (first + lane) // width * width
        total += tl.load(bias_ptr + channel).to(tl.float32)
    tl.store(out_ptr + start + lane, total.to(out_ptr.dtype.element_ty), mask=inside)
