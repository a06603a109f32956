"""Three ways to test a kernel: interpreted on the CPU, cross-compiled for GPUs that are not here, and run on one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from hueshift.kernels.compare import relative_error
from hueshift.kernels.cross_compile import Compiled, compile_launch
from hueshift.kernels.launch import Launch
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS
from hueshift.kernels.matrix_hazards import overwritten_operands, unguarded_copies

# What test files import by name; a process of its own has to be told.
SUPPORT = Path(__file__).resolve().parent.parent / "support"


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
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
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
    yield check_compiled
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def check_compiled(launch: Launch, arch: str, *, spills_allowed: bool = False) -> Compiled:
    """Compile a launch for `arch` and fail where it could not be launched there, spills, or has a race."""
    result = compile_launch(launch, arch)
    name, limit = launch.kernel.__name__, SHARED_MEMORY_LIMITS[arch]
    assert result.shared_bytes <= limit, f"{name}: {result.shared_bytes} bytes of shared memory > {limit}"
    assert spills_allowed or not result.stack_bytes, f"{name}: {result.stack_bytes} bytes spilled"
    assert result.programs(arch) >= 1, f"{name}: {result.registers} registers and {result.warps} warps do not fit"
    assert not overwritten_operands(result.ptx), f"{name}: a product's operand is overwritten before it is done"
    assert not unguarded_copies(result.ptx), f"{name}: memory may be refilled while another warp group multiplies it"
    return result


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
