"""From a base model to a serving TensorRT engine: export, build or find the plans, load, verify; or else torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import AdapterEngine, BuildProgress, EngineOptions
from hueshift.engines.cache_files import digest_file
from hueshift.engines.fallback_engine import FallbackEngine, OnFallback, report_fallback
from hueshift.engines.interface import Plan
from hueshift.engines.onnx_export import export_graph
from hueshift.engines.parity import OnParity
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.tensorrt_build import PER_MILLE, BuildSpec, build_plan
from hueshift.engines.tensorrt_engine import MERGED, TensorRtEngine
from hueshift.engines.tensorrt_lane import CudaLane, Lane
from hueshift.engines.tensorrt_loader import Fallback, TensorRT, TensorRtError, load_tensorrt
from hueshift.engines.tensorrt_plans import PlanCache, PlanIdentity, PlanRanges, StoredPlan
from hueshift.engines.tensorrt_runner import load_plan
from hueshift.engines.tensorrt_verify import verify
from hueshift.engines.tensorrt_weights import refit_weights, weight_table
from hueshift.engines.torch_engine import TorchEngine

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TensorRtParts:
    """The library and the GPU it runs on; a test gives doubles."""

    trt: TensorRT
    gpu: str
    capability: str
    lane: Lane


@dataclass(frozen=True, slots=True)
class Model:
    """The base model and what engines are made of."""

    base: BaseModel
    factors: SpectralFactors
    rows: RowLayout
    norms: Mapping[str, Tensor]


def find_parts(device: torch.device) -> TensorRtParts:
    """Import TensorRT for this device. Raises TensorRtError (missing, device)."""
    trt = load_tensorrt()
    if device.type != "cuda":
        raise TensorRtError(
            Fallback.DEVICE, f"engine.kind is tensorrt, but the engine runs on {device}; TensorRT needs a CUDA device"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return TensorRtParts(trt, torch.cuda.get_device_name(device), f"{major}.{minor}", CudaLane(device))


def ranges_of(base: BaseModel, options: EngineOptions) -> PlanRanges:
    """What the profile covers: from the smallest picture of the model to `max_size`, native size in between."""
    step = base.size_multiple // base.latent_factor
    largest = max(options.max_size // base.latent_factor // step * step, base.sample_size)
    return PlanRanges(options.max_batch, (min(step, base.sample_size), base.sample_size, largest), options.slots)


def prepare_plans(
    parts: TensorRtParts, model: Model, options: EngineOptions, report: BuildProgress, *, anew: bool = False
) -> dict[str, StoredPlan]:
    """Return the plan of every role, cached or built: `dense`, `factored`, and `merged` if `merge_after` is set.

    Raises TensorRtError (export, parse, memory, build).
    """
    roles = [Plan.DENSE.value, Plan.FACTORED.value, *([MERGED] if options.merge_after else [])]
    cache, ranges = PlanCache(options.cache_dir), ranges_of(model.base, options)
    return {role: _prepare(parts, model, options.cache_dir, cache, ranges, role, report, anew) for role in roles}


def _prepare(
    parts: TensorRtParts,
    model: Model,
    cache_dir: Path,
    cache: PlanCache,
    ranges: PlanRanges,
    role: str,
    report: BuildProgress,
    anew: bool,
) -> StoredPlan:
    trt = parts.trt
    graph = _export(model, cache_dir, role, report)
    weights = refit_weights(model.base.layout) if role == MERGED else ()
    timing = f"{trt.name}-{trt.version}-{parts.gpu}"
    spec = BuildSpec(graph, ranges, tuple(weight.name for weight in weights), cache.read_timing(timing))
    identity = PlanIdentity(
        role=role,
        base=model.base.base_hash,
        graph=digest_file(graph.with_name("manifest.json")),
        library=trt.name,
        version=trt.version,
        gpu=parts.gpu,
        capability=parts.capability,
        ranges=ranges,
        flags=spec.flags,
    )
    stage = f"build {role}"
    with cache.lock(identity):
        plan = None if anew else cache.find(identity)
        if plan is None:
            _log.info("plan_build", plan=identity.key, role=role, tensorrt=trt.version, gpu=parts.gpu)
            built = build_plan(trt, spec, lambda done, total: report(stage, done, total))
            plan = cache.store(identity, built.data, weight_table(weights))
            if built.timing:
                cache.write_timing(timing, built.timing)
        report(stage, PER_MILLE, PER_MILLE)
        return plan


def _export(model: Model, cache_dir: Path, role: str, report: BuildProgress) -> Path:
    """Write the fp16 graph. The merged one is dense without branches: its adapter is in the weights."""
    rows = RowLayout(model.rows.layout, (), model.rows.lowrank_rank, text_side=False) if role == MERGED else model.rows
    plan = Plan.FACTORED if role == Plan.FACTORED else Plan.DENSE
    try:
        return export_graph(
            model.base,
            model.factors,
            rows,
            plan,
            cache_dir,
            lambda done, total: report(f"export {role}", done, total),
            dtype=torch.float16,
        )
    except InvalidArgument as error:
        raise TensorRtError(Fallback.EXPORT, error.message, error.reason) from error


def load_engine(
    parts: TensorRtParts,
    model: Model,
    options: EngineOptions,
    plans: Mapping[str, StoredPlan],
    on_fallback: OnFallback | None = None,
) -> TensorRtEngine:
    """Make the engine of these plans, not yet verified. Raises TensorRtError (plan, memory, refit)."""
    try:
        loaded: dict[str, Any] = {role: load_plan(parts.trt, plan.file) for role, plan in plans.items()}
        return TensorRtEngine(
            parts.trt,
            model.base,
            model.factors,
            model.rows,
            model.norms,
            loaded,
            ranges_of(model.base, options),
            parts.lane,
            cuda_graphs=options.cuda_graphs,
            weights_validation=options.weights_validation,
            merge_after=options.merge_after,
            on_fallback=on_fallback,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise TensorRtError(
            Fallback.MEMORY, f"the plans do not fit the GPU's memory ({error}); lower engine.max_batch or engine.slots"
        ) from error


def build_tensorrt(
    model: Model,
    options: EngineOptions,
    device: torch.device,
    report: BuildProgress,
    on_parity: OnParity | None = None,
    on_fallback: OnFallback | None = None,
    parts: TensorRtParts | None = None,
    second: Callable[[bool], AdapterEngine] | None = None,
) -> AdapterEngine:
    """Return the verified engine, backed by torch; or torch itself, saying why in the log and to `on_fallback`.

    `second` makes the engine of torch, the eager one by default; it hears whether requests are waiting for it.

    Raises TensorRtError instead of falling back if `options.fallback` is False.
    """
    tell = on_fallback or (lambda reason: None)

    def make_torch(live: bool = False) -> AdapterEngine:
        if second is not None:
            return second(live)
        return TorchEngine(
            model.base,
            model.factors,
            model.rows,
            model.norms,
            slots=options.slots,
            max_batch=options.max_batch,
            device=device,
        )

    try:
        engine = _verified(parts or find_parts(device), model, options, report, on_parity, tell)
    except TensorRtError as error:
        if not options.fallback:
            raise
        report_fallback(error, tell)
        return make_torch()
    return FallbackEngine(engine, partial(make_torch, live=True), tell)


def _verified(
    parts: TensorRtParts,
    model: Model,
    options: EngineOptions,
    report: BuildProgress,
    on_parity: OnParity | None,
    on_fallback: OnFallback,
) -> TensorRtEngine:
    plans = prepare_plans(parts, model, options, report)
    try:
        engine = load_engine(parts, model, options, plans, on_fallback)
    except TensorRtError as error:
        if error.fallback is not Fallback.PLAN:
            raise
        # Whole by its digest and still refused, by another driver perhaps: once more, from the graph.
        _log.warning("plan_refused", problem=error.message)
        plans = prepare_plans(parts, model, options, report, anew=True)
        engine = load_engine(parts, model, options, plans, on_fallback)
    report("check", 0, 1)
    verify(engine, model.base, options.fp16_parity_bound, on_parity)
    report("check", 1, 1)
    return engine
