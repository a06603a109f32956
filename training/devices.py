"""The device that a process trains on: which kernels it may choose, and memory that goes back between jobs."""

import gc
import os
from typing import Any

import torch

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def prepare_device(device: torch.device) -> None:
    """Let CUDA choose kernels that give the same bits every time, and train on `device` in this thread.

    A job that goes on from its checkpoint then ends as one that was never stopped. It is a choice of the whole process,
    to be made before the first product: cuBLAS reads its workspace's size when it starts. Where torch has no such
    kernel it warns (attention in fp32 goes another way back). Does nothing for the CPU.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(0 if device.index is None else device.index)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every empty tensor is filled: a launch each, for numbers that nobody reads.
    choices: Any = torch.utils.deterministic
    choices.fill_uninitialized_memory = False


def release_memory(device: torch.device) -> None:
    """Give back what finished jobs held. A UNet's hooks know it, so it goes only when cycles are looked for."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
