"""Triton, where it is installed, and one launch as a record that can be run, interpreted or cross-compiled.

Without Triton every kernel module still imports and its CPU path works; running a launch then raises
KernelUnavailableError.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hueshift.kernels.errors import KernelUnavailableError

__all__ = ["Launch", "block_descriptor", "interpreted", "jit", "multiprocessors", "on_gpu", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None
    # Kernel signatures name these two when they are defined, so the names must exist; constants are made of the first.
    tl = SimpleNamespace(constexpr=lambda value: value, tensor=object)


def jit(function: Callable[..., Any]) -> Any:
    """Compile a kernel lazily with Triton, or leave the function alone where Triton is absent."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Tell whether Triton interprets kernels in this process, as it does in the tests, instead of compiling them."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: `arguments` vary at run time, `constants` are compiled in.

    Being data, the very launch that the GPU runs is also what the tests interpret and cross-compile.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Enqueue the kernel on the current stream. A grid with a zero in it does nothing.

        Raises KernelUnavailableError without Triton.
        """
        if triton is None:
            raise KernelUnavailableError(
                "the kernel needs Triton; install the `gpu` extra (pip install 'hueshift[gpu]')"
            )
        if 0 in self.grid:
            return
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Triton launches on the current device, which need not be the tensors'. On a CPU the context does nothing.
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            self.kernel[self.grid](**self.arguments, **self.constants, **options)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(value.device for value in self.arguments.values() if isinstance(value, Tensor))


def on_gpu(tensor: Tensor) -> bool:
    """Tell whether kernels run on `tensor`; elsewhere the public functions take their references."""
    return tensor.device.type == "cuda"


def block_descriptor(tensor: Tensor, block: tuple[int, int]) -> Any:
    """Describe `tensor` [rows, cols] for TMA loads of `block` elements.

    The caller has checked that rows begin on 16-byte boundaries. Raises KernelUnavailableError without Triton.
    """
    if triton is None:
        raise KernelUnavailableError(
            "TMA descriptors need Triton; install the `gpu` extra (pip install 'hueshift[gpu]')"
        )
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, which is what a persistent launch is sized by (H200: 132).

    The CPU, where kernels are only interpreted, counts as two so that persistent loops are walked more than once.
    """
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
