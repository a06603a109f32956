"""The device that a process trains on: which kernels it may choose, and memory that goes back between jobs."""

import gc
import os
from typing import Any

import torch

from hueshift.engines.device_errors import Fault, classify

# With these workspaces cuBLAS repeats its bits, and torch refuses products with any other.
_WORKSPACE, _REPEATING = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def prepare_device(device: torch.device) -> None:
    """Let CUDA choose kernels that give the same bits every time, and train on `device` in this thread.

    A job that goes on from its checkpoint then ends as one that was never stopped. It is a choice of the whole process,
    to be made before the first product: cuBLAS reads its workspace's size when it starts. An operation without such a
    kernel raises; training has none. Only to warn of it would not do: then torch lets attention's way back, flash and
    memory-efficient alike, add in whatever order its blocks end, and takes cuDNN's too. Does nothing for the CPU.
    """
    if device.type != "cuda":
        return
    if os.environ.get(_WORKSPACE) not in _REPEATING:
        os.environ[_WORKSPACE] = _REPEATING[0]
    torch.cuda.set_device(0 if device.index is None else device.index)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # Else every empty tensor is filled: a launch each, for numbers that nobody reads.
    choices: Any = torch.utils.deterministic
    choices.fill_uninitialized_memory = False


def lacks_memory(error: Exception) -> bool:
    """True if memory did not suffice: torch's, or what cuBLAS and the driver ask for, who have errors of their own."""
    return classify(error) is Fault.MEMORY


def release_memory(device: torch.device) -> None:
    """Give back what finished jobs held. A UNet's hooks know it, so it goes only when cycles are looked for."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
