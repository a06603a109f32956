"""What a benchmark of a kernel is: cases that are checked before they are timed, inside one CUDA graph.

The baseline is always the best formulation in torch, captured in a graph of its own, so that launch gaps flatter
neither side.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

# Ceilings of one H200: an 8192-cubed bf16 product on random data, and a device copy counted as read plus written.
H200_FLOPS = 790e12
H200_BYTES_PER_SECOND = 4.3e12
# Milliseconds of a dense, compiled UNet step at batch 16 on one (torch 2.11): what a branch's cost is a share of.
STEP_MS = {"sd15": 34.4}

Work = Callable[[], Any]


def load_script(path: Path) -> Any:
    """Import a benchmark's file by its path; their folder is on no path. Raises ImportError where that fails."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix weight of a UNet: its shape, and the input it sees without batch and channels."""

    name: str
    shape: tuple[int, ...]
    input: tuple[int, ...]
    stride: int = 1
    padding: int = 0

    @property
    def rows(self) -> int:
        """Output features."""
        return self.shape[0]

    @property
    def cols(self) -> int:
        """Input features times kernel size."""
        return prod(self.shape[1:])

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return min(self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. Each of `works` and `baselines` is one call on its own data; the time is that of one call.

    Several calls rotate among data sets where one set would stay in the L2 cache. `check` returns a relative error
    against float64 (or an exact reference), which must not exceed `tolerance`. `flops` and `bytes` are of one call.
    `dense` is the same layers without any adapter, where the cost over them is what matters. `details` go into the row;
    of `step_ms`, milliseconds of a step, the row says what share the call is, or what it takes beyond `dense`.
    """

    case: str
    works: Sequence[Work]
    baseline: str
    baselines: Sequence[Work]
    flops: float
    bytes: float
    floor_ms: float
    check: Callable[[], float]
    tolerance: float
    details: dict[str, Any] = field(default_factory=dict)
    dense: Work | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median, and the 20th and 80th percentile."""

    p50: float
    p20: float
    p80: float


def floor_ms(flops: float, moved: float) -> float:
    """Return the least milliseconds an H200 needs for so many operations and bytes."""
    return max(flops / H200_FLOPS, moved / H200_BYTES_PER_SECOND) * 1e3


def time_in_graph(works: Sequence[Work], replays: int = 100) -> Timing:
    """Capture all `works` in one CUDA graph and time its replays with device events."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    for _ in range(10):
        graph.replay()
    event: Any = torch.cuda.Event
    marks = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(replays)]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) / len(works) for begin, end in marks)
    return Timing(times[replays // 2], times[replays // 5], times[replays * 4 // 5])
