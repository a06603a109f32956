"""Checks that launchers make before a launch, as exceptions that survive `python -O`."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hueshift.kernels.errors import KernelArgumentError

HALF_TYPES = (torch.float16, torch.bfloat16)
# float32 and float64 run on the reference path only; the tensor-core kernels take 16-bit factors.
REFERENCE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_TYPES = (torch.int32, torch.int64)
# Vector loads of 16 bytes and TMA both need it.
ALIGNMENT = 16
# Inside one weight, or one picture, the kernels address with 32 bits.
MAX_ELEMENTS = 2**31 - 1


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise KernelArgumentError unless `tensor` has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise KernelArgumentError(f"{name} is {str(tensor.dtype).removeprefix('torch.')} (allowed: {names})")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise KernelArgumentError unless `tensor` has this shape; None stands for any size."""
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(want in (None, have) for want, have in zip(shape, given, strict=False))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelArgumentError(f"{name} has shape {list(given)} (needed: [{wanted}])")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise KernelArgumentError unless `tensor` lies on `device`."""
    if tensor.device != device:
        raise KernelArgumentError(f"{name} is on {tensor.device} (needed: {device}, like the other arguments)")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise KernelArgumentError unless `tensor` is contiguous in row-major order."""
    if not tensor.is_contiguous():
        raise KernelArgumentError(
            f"{name} has strides {list(tensor.stride())} (needed: contiguous, call .contiguous())"
        )


def check_inner_contiguous(name: str, tensor: Tensor, dims: int) -> None:
    """Raise KernelArgumentError unless the last `dims` dimensions are packed; outer strides are free."""
    expected = 1
    for axis in range(tensor.dim() - 1, tensor.dim() - 1 - dims, -1):
        if tensor.shape[axis] > 1 and tensor.stride(axis) != expected:
            raise KernelArgumentError(
                f"{name} has strides {list(tensor.stride())} (needed: the last {dims} dimension(s) packed)"
            )
        expected *= tensor.shape[axis]


def check_aligned(name: str, tensor: Tensor) -> None:
    """Raise KernelArgumentError unless the first element lies on a 16-byte boundary."""
    if tensor.numel() and tensor.data_ptr() % ALIGNMENT:
        raise KernelArgumentError(
            f"{name} starts {tensor.data_ptr() % ALIGNMENT} bytes past a {ALIGNMENT}-byte boundary (needed: aligned; "
            "do not slice inside a row)"
        )


def check_apart(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise KernelArgumentError if two tensors share bytes of memory."""
    if not tensor.numel() or not other.numel() or tensor.device != other.device:
        return
    begin, end = span(tensor)
    other_begin, other_end = span(other)
    if begin < other_end and other_begin < end:
        raise KernelArgumentError(f"{name} and {other_name} overlap in memory (needed: separate storage)")


def check_all_apart(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise KernelArgumentError if any two of the named tensors, all on one device, share bytes of memory."""
    spans = sorted((*span(tensor), name) for name, tensor in tensors if tensor.numel())
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise KernelArgumentError(f"{name} and {other} overlap in memory (needed: separate storage)")


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the one-past-last byte address that the elements of `tensor` touch."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_index(name: str, index: Tensor, low: int, high: int) -> None:
    """Raise KernelArgumentError on a wrong index dtype, shape or stride, or on a value outside low..high-1.

    Values are looked at only on the CPU: reading them from a GPU would stall the stream. There, build the index with
    `adapter_index.make_index`, which checks before the upload; the kernels never read outside a slab in any case.
    """
    check_dtype(name, index, INDEX_TYPES)
    check_shape(name, index, (None,))
    check_contiguous(name, index)
    if index.device.type == "cpu" and index.numel():
        least, most = int(index.min()), int(index.max())
        if least < low or most >= high:
            raise KernelArgumentError(f"{name} has values {least}..{most} (allowed: {low}..{high - 1})")
