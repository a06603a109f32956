"""Training steps as graphs of torch.compile's kernels: the third way of shared_training.py, with its baselines.

    python -P benchmarks/run_gpu.py compiled_training

Apart, because each size of batch is compiled first, which takes minutes: here one job, and a company of eight. W in
every step is a CUDA graph of torch's kernels.
"""

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hueshift.engines.cuda_lane import lane_of
from hueshift.training.sharing.compiled import inductor

COMPANIES = (8,)


def _load_shared() -> Any:
    """The folder is on no path."""
    path = Path(__file__).with_name("shared_training.py")
    found = importlib.util.spec_from_file_location("benchmark_shared_training", path)
    if found is None or found.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(found)
    # Dataclasses look their own module up by its name.
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


SHARED = _load_shared()
SHAPES: Mapping[str, Any] = SHARED.SHAPES


def rows(
    shape: Any, device: torch.device, about: Mapping[str, Any], *, chosen: Sequence[Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Measure one model with one picture a step, in this way or in those that are chosen."""
    ways = chosen or [SHARED.Way("-inductor", lane_of(device), inductor)]
    for row in SHARED.rows(shape, device, about, companies=COMPANIES, batches=(1,), chosen=ways):
        yield {**row, "bench": "compiled_training"}
