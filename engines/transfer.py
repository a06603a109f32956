"""Numbers from the host to a device, without a stop."""

from collections.abc import Mapping

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Queue the copy of a tensor of the host and return at once; what is on `device` already is returned as it is."""
    # To the host a copy that nobody waits for would be read before it is there.
    return pinned_for(tensor, device).to(device, non_blocking=device.type != "cpu")


def pinned_for(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself, or a copy in page-locked memory where it is the host's and `device` a GPU.

    From ordinary memory CUDA may copy only when the host has waited for all that the stream has to do before: with a
    step queued ahead, that is the whole of that step. Page-locked memory comes from torch's cache, which keeps a block
    until the copies out of it are done.
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def pinned_bytes(nbytes: int) -> int:
    """Bytes of the page-locked block that torch takes for `nbytes`: the next power of two (CachingHostAllocator.h)."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def pin_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors of one dtype in one page-locked block, of which rounding up takes less than of one for each."""
    if not tensors:
        return {}
    block = torch.cat([tensor.flatten() for tensor in tensors.values()]).pin_memory()
    parts = torch.split(block, [tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
