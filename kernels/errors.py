"""What a kernel's launcher raises. Kernels import nothing of the project, so these are their own types."""


class KernelArgumentError(ValueError):
    """An argument that the kernel does not take: its message names what was given and what is allowed."""


class KernelUnavailableError(RuntimeError):
    """A kernel was asked to run where it cannot: Triton is not installed, or the GPU is too old."""
