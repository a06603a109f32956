"""Errors are told apart by what they say about the device, however they are wrapped."""

import pytest
import torch

from hueshift.engines.device_errors import Fault, classify, release_memory


class CodedError(RuntimeError):
    """As torch.AcceleratorError has it: a text and the runtime's code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.error_code = code


def wrapped(cause: BaseException) -> BaseException:
    """An error of ours around it."""
    error = ValueError("the engine failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_what_does_not_fit_is_memory(error: BaseException) -> None:
    assert classify(error) is Fault.MEMORY
    assert classify(wrapped(error)) is Fault.MEMORY


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        CodedError("CUDA error", 719),
        CodedError("CUDA error", 214),
    ],
)
def test_what_never_comes_back_is_lost(error: BaseException) -> None:
    assert classify(error) is Fault.LOST
    assert classify(wrapped(error)) is Fault.LOST


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), CodedError("CUDA error: invalid argument", 1)])
def test_everything_else_is_neither(error: BaseException) -> None:
    assert classify(error) is Fault.OTHER


def test_causes_that_form_a_ring_end() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is Fault.OTHER


def test_releasing_memory_needs_no_gpu() -> None:
    release_memory()
