"""How a weight lies in memory, and factors put into that order: the kernels see every weight as a row-major matrix.

A kernel that wrote (c_in, kh, kw) columns into a channels_last parameter would corrupt it silently. Permuting the
factor's columns once, when a plan is built, makes the channels_last write free.
"""

import torch
from torch import Tensor

from hueshift.kernels.checks import check_contiguous
from hueshift.kernels.errors import KernelArgumentError


def channels_last(weight: Tensor) -> bool:
    """Tell whether a 4-D weight lies in memory as (c_out, kh, kw, c_in) and not as (c_out, c_in, kh, kw)."""
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def check_format(name: str, base: Tensor, out: Tensor) -> None:
    """Raise KernelArgumentError unless both weights are 2-D or 4-D, dense, and of one memory format."""
    if base.dim() not in (2, 4):
        raise KernelArgumentError(f"{name}.base has {base.dim()} dimensions (allowed: 2 or 4)")
    if channels_last(out) != channels_last(base):
        raise KernelArgumentError(f"{name}.base and {name}.out have different memory formats (needed: the same)")
    for part, tensor in (("base", base), ("out", out)):
        if not channels_last(tensor):
            check_contiguous(f"{name}.{part}", tensor)


def columns_in_memory_order(factor: Tensor, weight: Tensor) -> Tensor:
    """Return `factor` [r, n], n over (c_in, kh, kw), contiguous, its columns in the order of the weight's memory."""
    if not channels_last(weight):
        return factor.contiguous()
    _, c_in, kh, kw = weight.shape
    return factor.view(-1, c_in, kh, kw).permute(0, 2, 3, 1).reshape(-1, c_in * kh * kw).contiguous()
