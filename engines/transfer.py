"""Numbers from the host to a device, without a stop."""

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
