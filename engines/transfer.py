"""Numbers from the host to a device, without a stop."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Queue the copy of a tensor of the host and return at once; what is on `device` already is returned as it is.

    From ordinary memory CUDA copies while the host waits for all that the device has to do before. Pinned memory comes
    from torch's cache, which keeps a block until the copy out of it is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
