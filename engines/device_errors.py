"""What went wrong on a device: a call that was too large for its memory, a device that is gone, or something else.

A CUDA error other than a failed allocation is sticky: every later call of the process fails with it, so only a new
process can serve again.
"""

from collections.abc import Iterator
from enum import StrEnum

import torch

# cudaError values after which the context is unusable (CUDA Runtime API, "Data types used by CUDA Runtime"): ECC error,
# NVLink error, device unavailable or lost (thermal, driver), illegal address, launch timeout, assert, hardware stack,
# illegal instruction, misaligned address, invalid address space, invalid program counter, launch failure, unknown.
_LOST_CODES = frozenset({46, 214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 999})
_OUT_OF_MEMORY = 2
# torch before 2.9 raises a plain RuntimeError with these words and no code.
_LOST_WORDS = (
    "device-side assert",
    "unspecified launch failure",
    "illegal memory access",
    "uncorrectable ecc",
    "uncorrectable nvlink",
    "illegal instruction",
    "misaligned address",
    "launch timed out",
    "hardware stack error",
    "invalid program counter",
    "device(s) is/are busy or unavailable",
    "gpu has fallen off the bus",
    "cuda error: unknown error",
)


class NoEngineError(RuntimeError):
    """No engine of the process can draw any more, whatever the device does: only a new process can serve again."""


class Fault(StrEnum):
    """What an error says about the device."""

    MEMORY = "memory"
    """The call did not fit: a smaller one may."""

    LOST = "lost"
    """The device does not answer any more, or every later call fails for want of an engine: the process must end."""

    OTHER = "other"
    """Nothing about the device: a defect, or a refusal."""


def classify(error: BaseException) -> Fault:
    """Say what `error`, or what caused it, tells about the device."""
    for cause in _causes(error):
        if isinstance(cause, NoEngineError):
            return Fault.LOST
        if isinstance(cause, torch.cuda.OutOfMemoryError | MemoryError):
            return Fault.MEMORY
        if isinstance(cause, RuntimeError) and _is_lost(cause):
            return Fault.LOST
        if isinstance(cause, RuntimeError) and _is_memory(cause):
            return Fault.MEMORY
    return Fault.OTHER


def release_memory() -> None:
    """Give cached blocks back to the device, so that a smaller call finds them in one piece. Does nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_memory(error: RuntimeError) -> bool:
    # torch's allocator on a CPU raises RuntimeError, cuBLAS one of its own where its workspace does not fit. What the
    # driver allocates itself, such as a graph that is made ready to be launched, comes as a plain CUDA error; where it
    # has no room for a kernel's code, Triton tells.
    text = str(error)
    words = ("can't allocate memory", "_ALLOC_FAILED", "CUDA error: out of memory", "[CUDA]: out of memory")
    return getattr(error, "error_code", None) == _OUT_OF_MEMORY or any(word in text for word in words)


def _is_lost(error: RuntimeError) -> bool:
    # torch.AcceleratorError carries the code from torch 2.9 on.
    code = getattr(error, "error_code", None)
    if isinstance(code, int) and code in _LOST_CODES:
        return True
    text = str(error).lower()
    return any(words in text for words in _LOST_WORDS)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
