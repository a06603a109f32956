"""Training steps as graphs of torch.compile's kernels: the third way of shared_training.py, with its baselines.

    python -P benchmarks/run_gpu.py compiled_training

Apart, because each size of batch is compiled first, which takes minutes: here one job, and a company of eight. W in
every step is a CUDA graph of torch's kernels.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hueshift.engines.cuda_lane import lane_of
from hueshift.kernels.bench import load_script
from hueshift.training.sharing.compiled import inductor

COMPANIES = (8,)
SHARED = load_script(Path(__file__).with_name("shared_training.py"))
SHAPES: Mapping[str, Any] = SHARED.SHAPES


def rows(
    shape: Any, device: torch.device, about: Mapping[str, Any], *, chosen: Sequence[Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Measure one model with one picture a step, in this way or in those that are chosen."""
    ways = chosen or [SHARED.Way("-inductor", lane_of(device), inductor)]
    for row in SHARED.rows(shape, device, about, companies=COMPANIES, batches=(1,), chosen=ways):
        yield {**row, "bench": "compiled_training"}
