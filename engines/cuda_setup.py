"""From a base model to a serving CUDA engine: make it, choose its forms, capture, measure, say what fits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, runtime_checkable

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, HueshiftError, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.calibration import (
    check_compiled,
    check_merged,
    choose_forms,
    measure_capacity,
    measure_costs,
    tell_capacity,
    warm_all,
)
from hueshift.engines.convolution_search import convolution_search
from hueshift.engines.cost_code import measured_code
from hueshift.engines.cost_store import Calibration, read_costs, write_costs
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import GraphLane
from hueshift.engines.cuda_options import CudaOptions, EngineObserver, KernelUse
from hueshift.engines.cuda_reserve import Reserve, kept_free, measure_reserve
from hueshift.engines.device_errors import Fault, classify, release_memory
from hueshift.engines.interface import SLAB_PLANS, UNetEngine
from hueshift.engines.planner import Planner
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.kernels.errors import KernelUnavailableError
from hueshift.kernels.launch import triton
from hueshift.kernels.probe import check_launches

Progress = Callable[[str, int, int], None]
# Of the device's memory, for whole weights of every slot where the settings say nothing: 14 GB of an H200, of which
# SD1.5 takes 7.
_SLOT_WEIGHTS_SHARE = 10
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

    The capacity is what fits beside all that others take while they work (engines/cuda_reserve.py).

    A `live` one is for a server whose requests are waiting for it: it is not warm, so every batch shape is captured
    when it is called again; it knows its costs and what fits if an engine like it was measured here before, else it
    tells no capacity; and it merges nothing, because packing the factors takes as long as all the rest.

    Where memory is too short for merged weights it goes on without. Raises FailedPrecondition: ENGINE_UNAVAILABLE if
    an attention backend is missing or the kernels are forced and cannot be launched, ENGINE_PARITY if they are forced
    and draw something else than torch.
    """
    options = _with_usable_kernels(options, lane.device)
    if options.slot_weight_bytes is None:
        # Of what there is and not of what is free: the same at every start, for measured costs to be found again.
        options = replace(options, slot_weight_bytes=(lane.total_bytes() or 0) // _SLOT_WEIGHTS_SHARE)

    def make(options: CudaOptions) -> CudaEngine:
        given = (base, factors, rows, norms)
        return CudaEngine(*given, slots=slots, max_batch=max_batch, lane=lane, options=options, observer=observer)

    if live:
        return _live(make, options, cache_dir)
    reserve = measure_reserve(base, lane, options, max_batch)
    engine = _make_with_room(make, options, lane, reserve)
    identity = describe(engine)
    known = read_costs(cache_dir, identity)
    # Before warm_all too: a shape that is called without a search keeps what it was given then.
    with convolution_search(options.searches):
        kernels = choose_forms(engine, known.kernels if known is not None else None)
        check_merged(engine)
        check_compiled(engine)
        with kept_free(lane, reserve):
            calls = warm_all(engine, progress)
    release_memory()
    measured = measure_costs(engine, calls, progress) if known is None else known.table
    engine.costs, engine.capacity = measured, measure_capacity(engine, calls)
    tell_capacity(engine)
    found = Calibration(measured, kernels, engine.capacity)
    # What fits may be another at each start. The last is kept for an engine that is made while requests wait. What was
    # measured without something that failed is of no use to a start at which it does not.
    whole = len(kernels) == len(SLAB_PLANS) and str(engine.weight_slots) == identity["weight_slots"]
    if whole and found != known:
        write_costs(cache_dir, identity, found)
    return engine


def _live(make: Callable[[CudaOptions], CudaEngine], options: CudaOptions, cache_dir: Path) -> CudaEngine:
    engine = make(replace(options, weight_slots=0))
    # It has the costs of what the options ask for: those of merged weights are of no use to it, and no harm. Where they
    # had no room the engine that was measured went on without, as this one does.
    identity = describe(engine)
    known = read_costs(cache_dir, identity | {"weight_slots": str(options.weight_slots)})
    known = known or read_costs(cache_dir, identity)
    if known is not None:
        engine.costs, engine.capacity = known.table, known.capacity
        tell_capacity(engine)
    if known is not None or options.kernels is KernelUse.ON:
        choose_forms(engine, known.kernels if known is not None else None)
    else:
        engine.networks.settle()
    return engine


def _with_usable_kernels(options: CudaOptions, device: torch.device) -> CudaOptions:
    """The same, or without kernels and what is written by them where Triton can launch nothing.

    Found out at the first real kernel, the log would be full of tracebacks that do not say what to install.
    """
    if device.type != "cuda" or options.kernels is KernelUse.OFF:
        return options
    try:
        check_launches(device)
        return options
    except KernelUnavailableError as error:
        if classify(error) is not Fault.OTHER:
            raise
        if options.kernels is KernelUse.ON:
            raise FailedPrecondition(
                Reason.ENGINE_UNAVAILABLE,
                f"engine.kernels is on, but {error}; or set engine.kernels to auto, which serves without them, slower",
            ) from error
        _log.error("kernels_unavailable", serves="torch", error=str(error))
    return replace(options, kernels=KernelUse.OFF, weight_slots=0)


def _make_with_room(
    make: Callable[[CudaOptions], CudaEngine], options: CudaOptions, lane: GraphLane, reserve: Reserve
) -> CudaEngine:
    """Make the engine with merged weights if they fit beside the reserve and can be written, else without."""
    if not options.weight_slots:
        return make(options)
    try:
        with kept_free(lane, reserve):
            return make(options)
    except HueshiftError:
        raise
    except Exception as error:
        # Kernels write the weights, and Triton has errors of its own where a GPU does not take one.
        fault, told = classify(error), {"weight_slots": options.weight_slots}
        if fault is Fault.LOST:
            raise
        if fault is Fault.MEMORY:
            _log.warning("merged_plan_off", **told, error=str(error).splitlines()[0])
        else:
            _log.error("merged_plan_failed", **told, exc_info=error)
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
        "convolutions": "searched" if options.searches else "by rule",
        "kernels": options.kernels.value,
        "attention": str(options.attention),
        "dtype": str(engine.dtype),
        "weight_slots": str(engine.weight_slots),
        "slot_weights": f"{len(engine.networks.slot_weights.weights)} layers of {engine.slots} slots",
        "sizes": str(options.warm_sizes),
        "buckets": str(engine.buckets),
        "branches": f"{engine.rows.lowrank_targets} rank {engine.rows.lowrank_rank}",
    }
