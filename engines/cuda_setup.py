"""From a base model to a serving CUDA engine: make it, choose its forms, capture, measure, say what fits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, runtime_checkable

import structlog
import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.calibration import choose_forms, measure_capacity, measure_costs, warm_all
from hueshift.engines.cost_code import measured_code
from hueshift.engines.cost_store import Calibration, read_costs, write_costs
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import GraphLane
from hueshift.engines.cuda_options import CudaOptions, EngineObserver, KernelUse
from hueshift.engines.device_errors import release_memory
from hueshift.engines.interface import UNetEngine
from hueshift.engines.planner import Planner
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.kernels.launch import triton

Progress = Callable[[str, int, int], None]
_log = structlog.get_logger()


@runtime_checkable
class ChangingEngine(Protocol):
    """An engine in whose place another may serve (engines/fallback_engine.py, which needs packages of an extra)."""

    @property
    def serving(self) -> UNetEngine:
        """The one that serves now."""
        ...


def build_cuda(
    base: BaseModel,
    factors: SpectralFactors,
    rows: RowLayout,
    norms: Mapping[str, Tensor],
    *,
    slots: int,
    max_batch: int,
    options: CudaOptions,
    lane: GraphLane,
    cache_dir: Path,
    progress: Progress,
    observer: EngineObserver | None = None,
    live: bool = False,
) -> CudaEngine:
    """Return a warm engine that knows its costs and its capacity. `progress` hears of `capture` and `calibrate`.

    A `live` one is for a server whose requests are waiting for it: it is not warm, so every batch shape is captured
    when it is called again; it knows its costs if an engine like it was measured here before; and it merges nothing,
    because packing the factors takes as long as all the rest.

    Where memory is too short for merged weights it goes on without. Raises FailedPrecondition: ENGINE_UNAVAILABLE if
    an attention backend is missing, ENGINE_PARITY if the kernels are forced and draw something else than torch.
    """

    wanted = options
    if live:
        options = replace(options, weight_slots=0)

    def make(options: CudaOptions) -> CudaEngine:
        given = (base, factors, rows, norms)
        return CudaEngine(*given, slots=slots, max_batch=max_batch, lane=lane, options=options, observer=observer)

    engine = _make_with_room(make, options)
    # A live one has the costs of what the options ask for: those of merged weights are of no use to it, and no harm.
    identity = describe(engine) | ({"weight_slots": str(wanted.weight_slots)} if live else {})
    known = read_costs(cache_dir, identity)
    if live:
        if known is not None:
            engine.costs = known.table
        if known is not None or options.kernels is KernelUse.ON:
            choose_forms(engine, known.kernels if known is not None else None)
        return engine
    kernels = choose_forms(engine, known.kernels if known is not None else None)
    calls = warm_all(engine, progress)
    if known is None:
        known = Calibration(measure_costs(engine, calls, progress), kernels)
        write_costs(cache_dir, identity, known)
    engine.costs = known.table
    engine.capacity = measure_capacity(engine, calls)
    return engine


def _make_with_room(make: Callable[[CudaOptions], CudaEngine], options: CudaOptions) -> CudaEngine:
    try:
        return make(options)
    except torch.cuda.OutOfMemoryError as error:
        if not options.weight_slots:
            raise
        _log.warning("merged_plan_off", weight_slots=options.weight_slots, error=str(error).splitlines()[0])
    # Not above: while the error is being handled, its traceback holds all that the first one had allocated.
    release_memory()
    return make(replace(options, weight_slots=0))


def planner_of(engine: UNetEngine) -> Planner | None:
    """What divides the engine's batches into calls; None for an engine that was not measured."""
    if isinstance(engine, ChangingEngine):
        engine = engine.serving
    if isinstance(engine, CudaEngine) and engine.costs is not None:
        return Planner(engine, engine.costs, engine.capacity)
    return None


def describe(engine: CudaEngine) -> dict[str, str]:
    """Everything that measured costs depend on."""
    options, device = engine.options, engine.lane.device
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "host",
        "base": engine.base.base_hash,
        "hueshift": version("hueshift"),
        "code": measured_code(),
        "torch": torch.__version__,
        "triton": "absent" if triton is None else str(triton.__version__),
        "cuda": str(torch.version.cuda),
        "compile": f"{options.compile} autotune {options.autotune}",
        "kernels": options.kernels.value,
        "attention": str(options.attention),
        "dtype": str(engine.dtype),
        "weight_slots": str(engine.weight_slots),
        "sizes": str(options.warm_sizes),
        "buckets": str(engine.buckets),
        "branches": f"{engine.rows.lowrank_targets} rank {engine.rows.lowrank_rank}",
    }
