"""Three ways to test a kernel: interpreted on the CPU, cross-compiled for GPUs that are not here, and run on one."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import relative_error
from hueshift.kernels.launch import Launch
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS


class Interpret(Protocol):
    """Calls a function of a test file in a process where Triton interprets."""

    def __call__(self, path: str, function: str, **parameters: object) -> dict[str, float]:
        """Return the function's dict of floats."""
        ...


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """One worker process for the whole session: importing torch and Triton takes seconds."""
    pytest.importorskip("triton")
    worker = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("interpreter_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    sent, received = worker.stdin, worker.stdout
    if sent is None or received is None:
        raise RuntimeError("the interpreter worker has no pipes")

    def call(path: str, function: str, **parameters: object) -> dict[str, float]:
        sent.write(json.dumps({"path": path, "function": function, "parameters": parameters}) + "\n")
        sent.flush()
        line = received.readline()
        if not line:
            pytest.fail(f"the interpreter worker ended with {worker.wait(10)}")
        answer: dict[str, Any] = json.loads(line)
        if "failure" in answer:
            pytest.fail(answer["failure"])
        return dict(answer["result"])

    yield call
    sent.close()
    worker.wait(30)
    received.close()


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ptxas made of a kernel."""

    shared_bytes: int
    stack_bytes: int
    ptx: str

    @property
    def tensor_core(self) -> str:
        """The matrix instruction used: wgmma, mma or none."""
        if "wgmma.mma_async" in self.ptx:
            return "wgmma"
        return "mma" if "mma.sync" in self.ptx else "none"


class CrossCompile(Protocol):
    """Compiles a launch for an architecture and checks that it could be launched there."""

    def __call__(self, launch: Launch, arch: str, *, spills_allowed: bool = False) -> Compiled:
        """Return what came out; registers that did not fit are a failure unless allowed."""
        ...


@pytest.fixture(scope="session")
def cross_compile(pytestconfig: pytest.Config) -> Iterator[CrossCompile]:
    """Compile with the bundled ptxas; no GPU is needed. Results are kept in pytest's cache, keyed by source."""
    pytest.importorskip("triton")
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))
    yield compile_launch
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def compile_launch(launch: Launch, arch: str, *, spills_allowed: bool = False) -> Compiled:
    """Specialise a launch on its arguments as Triton would at run time, then compile it for `arch`."""
    import triton
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
    result = Compiled(compiled.metadata.shared, stack_bytes(compiled.asm["cubin"]), compiled.asm["ptx"])
    limit = SHARED_MEMORY_LIMITS[arch]
    assert result.shared_bytes <= limit, f"{kernel.__name__}: {result.shared_bytes} bytes of shared memory > {limit}"
    assert spills_allowed or not result.stack_bytes, f"{kernel.__name__}: {result.stack_bytes} bytes spilled"
    return result


def stack_bytes(cubin: bytes) -> int:
    """Return the stack frame of the kernel in a cubin: registers that did not fit."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"STACK:(\d+)", report)
    assert found, report
    return max(int(size) for size in found)


@pytest.fixture
def gpu() -> torch.device:
    """The first CUDA device, seeded; skips without one."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    return torch.device("cuda")


class CheckOnGpu(Protocol):
    """Checks one kernel call on a GPU in every way that does not depend on the kernel."""

    def __call__(
        self,
        *,
        reset: Callable[[], None],
        run: Callable[[], Any],
        outputs: list[Tensor],
        expected: list[Tensor],
        tolerance: float,
    ) -> None:
        """Fail on a wrong, unwritten or unsteady output, or where a captured graph differs from the call."""
        ...


@pytest.fixture
def check_on_gpu(gpu: torch.device) -> CheckOnGpu:
    """Parity with float64 over poisoned outputs, the same bits twenty times, the same bits from a CUDA graph.

    `reset` puts the inputs back and fills pure outputs with NaN.
    """

    def check(
        *,
        reset: Callable[[], None],
        run: Callable[[], Any],
        outputs: list[Tensor],
        expected: list[Tensor],
        tolerance: float,
    ) -> None:
        reset()
        run()
        torch.cuda.synchronize(gpu)
        first = [output.clone() for output in outputs]
        for number, (output, want) in enumerate(zip(first, expected, strict=True)):
            error = relative_error(output, want)
            assert error <= tolerance, f"output {number}: relative error {error}"
        for _ in range(20):
            reset()
            run()
            for output, want in zip(outputs, first, strict=True):
                assert torch.equal(output, want), "the same call gave other bits: a race"
        reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for _ in range(3):
            reset()
            graph.replay()
            torch.cuda.synchronize(gpu)
            for output, want in zip(outputs, first, strict=True):
                assert torch.equal(output, want), "the captured graph gave other bits"

    return check
