"""What a launch becomes for a GPU that is not here: Triton and its ptxas compile for it on any machine.

For tests and benchmarks/compiled_resources.py: registers, spills, shared memory, how wide memory is read and written,
and how many programs fit on a multiprocessor. Nothing on the path of a request uses it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hueshift.kernels.errors import KernelUnavailableError
from hueshift.kernels.launch import Launch, triton


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    shared_bytes: int
    warps: int
    blocks: int
    registers: int = 65_536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(167_936, 64, 32),
    "sm_89": Multiprocessor(102_400, 48, 24),
    "sm_90": Multiprocessor(233_472, 64, 32),
}
# What the driver keeps of every block's shared memory, and the unit in which a warp's registers are given out.
RESERVED_SHARED = 1024
REGISTER_UNIT = 256
ACCESS = re.compile(r"\b(?P<kind>ld|st)\.global(?:\.[\w:]+)*?(?:\.v(?P<count>\d))?\.[bfus](?P<bits>\d+)\b")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)* \[.*?\], \[.*?\], (?:0x)?(?P<bytes>[0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ptxas made of a kernel. `registers` are of one thread, `stack_bytes` what did not fit in them (spills)."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    ptx: str

    @property
    def tensor_core(self) -> str:
        """The matrix instruction used: wgmma, mma or none."""
        if "wgmma.mma_async" in self.ptx:
            return "wgmma"
        return "mma" if "mma.sync" in self.ptx else "none"

    @property
    def tma_copies(self) -> int:
        """Instructions of the bulk tensor copy engine: a loop of two operands and s stages, all in use, has 2 s."""
        return len(re.findall(r"cp\.async\.bulk\.tensor\.\dd", self.ptx))

    def accesses(self, kind: str) -> Counter[int]:
        """Count global reads (`ld`), writes (`st`) or asynchronous copies to shared memory (`cp`) by bytes a thread."""
        if kind == "cp":
            return Counter(int(found["bytes"], 16) for found in COPY.finditer(self.ptx))
        return Counter(
            int(found["count"] or 1) * int(found["bits"]) // 8
            for found in ACCESS.finditer(self.ptx)
            if found["kind"] == kind
        )

    def programs(self, arch: str) -> int:
        """Return how many programs are resident on a multiprocessor of `arch` at a time."""
        limits = MULTIPROCESSORS[arch]
        warp_registers = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        return min(
            limits.blocks,
            limits.warps // self.warps,
            limits.registers // (warp_registers * self.warps),
            limits.shared_bytes // (self.shared_bytes + RESERVED_SHARED),
        )


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Specialise a launch on its arguments as Triton would at run time, then compile it for `arch` (such as sm_90).

    Raises KernelUnavailableError without Triton.
    """
    if triton is None:
        raise KernelUnavailableError("cross-compiling needs Triton; install the `gpu` extra")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = CUDABackend(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **launch.constants, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=parsed.__dict__)
    registers, stack = resource_usage(compiled.asm["cubin"])
    return Compiled(registers, stack, compiled.metadata.shared, launch.num_warps, compiled.asm["ptx"])


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers of one thread and bytes of its stack frame, of the kernel in a cubin.

    Raises RuntimeError where cuobjdump's report cannot be read.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resources: {report!r}")
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)
