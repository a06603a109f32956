"""CUDA engines on a lane of the host."""

from collections.abc import Callable
from pathlib import Path

from tiny_unet import TinyParts

from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import GraphLane
from hueshift.engines.cuda_options import CudaOptions, EngineObserver
from hueshift.engines.cuda_setup import build_cuda


def cuda_engine(parts: TinyParts, lane: GraphLane, *, max_batch: int = 4, **options: object) -> CudaEngine:
    """An engine of five slots and two weight slots on `lane`, which nothing has warmed."""
    given = (parts.base, parts.factors, parts.rows, parts.norms)
    return CudaEngine(*given, slots=5, max_batch=max_batch, lane=lane, options=cuda_options(**options))


def built_engine(
    parts: TinyParts,
    lane: GraphLane,
    cache: Path,
    *,
    max_batch: int = 4,
    live: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    observer: EngineObserver | None = None,
    **options: object,
) -> CudaEngine:
    """The same as a deployment has it: warm and measured, unless it is `live`."""
    return build_cuda(
        parts.base,
        parts.factors,
        parts.rows,
        parts.norms,
        slots=5,
        max_batch=max_batch,
        options=cuda_options(**options),
        lane=lane,
        cache_dir=cache,
        progress=progress,
        observer=observer,
        live=live,
    )


def cuda_options(**options: object) -> CudaOptions:
    """Options by name, for pictures of 8 x 8 latents."""
    given: dict[str, object] = {"warm_sizes": ((8, 8),), "max_area": 256, "weight_slots": 2, **options}
    return CudaOptions(**given)  # type: ignore[arg-type]  # a test's options by name
