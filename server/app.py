"""From the settings to warm services: the base model, its decomposition, the engine. Runs in a thread, for a while."""

import os
from collections.abc import Callable
from importlib.metadata import version

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from hueshift.engines.base_model import load_base_model
from hueshift.engines.build import EngineOptions, build_engine
from hueshift.server.clock import Clock
from hueshift.server.engine_metrics import EngineMetrics
from hueshift.server.metrics import Metrics
from hueshift.server.services import ServiceSet, ServingParts
from hueshift.server.settings import EngineSettings, Settings
from hueshift.server.store.stores import Stores

Progress = Callable[[str, int, int], None]


def build_services(
    settings: Settings, stores: Stores, metrics: Metrics, clock: Clock, progress: Progress
) -> ServiceSet:
    """Load the model and warm the engine; `progress` hears of what takes long.

    Raises what loading the base model and building the engine raise.
    """
    # Their bars would run through the log; ours tell of what takes long.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(settings.engine.threads or os.cpu_count() or 1)
    base = load_base_model(settings.model.path, device=base_device(settings.engine))

    def report(stage: str, done: int, total: int) -> None:
        metrics.engine_build_progress.labels(stage).set(done / total)
        progress(stage, done, total)

    engine = build_engine(
        base,
        engine_options(settings),
        progress=report,
        on_parity=lambda plan, error: metrics.engine_parity_error.labels(plan).set(error),
        on_fallback=lambda reason: metrics.engine_fallbacks.labels(reason).inc(),
        observer=EngineMetrics(metrics),
    )
    engine.warm()
    metrics.build.info(
        {
            "version": version("hueshift"),
            "engine": engine.name,
            "model": base.name,
            "base_hash": base.base_hash[:12],
            "torch": torch.__version__,
        }
    )
    parts = ServingParts(base, engine, engine.rows, engine.factors, engine.norms)
    return ServiceSet(settings, stores, metrics, clock, parts)


def base_device(engine: EngineSettings) -> str:
    """Return where the base model goes: a CUDA device if one is there and the settings let the engine run on it.

    A device that is named but absent is left for the engine to refuse.
    """
    if engine.kind == "onnxruntime" or not torch.cuda.is_available():
        return "cpu"
    devices = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    wanted = "cuda" if engine.device == "auto" else engine.device
    return wanted if wanted in devices else "cpu"


def engine_options(settings: Settings) -> EngineOptions:
    """Return what the settings say about the engine."""
    chosen = settings.engine
    return EngineOptions(
        kind=chosen.kind,
        device=chosen.device,
        threads=chosen.threads,
        slots=chosen.slots,
        max_batch=chosen.max_batch,
        lowrank_rank=chosen.lowrank_rank,
        lowrank_targets=chosen.lowrank_targets,
        parity_bound=chosen.parity_bound,
        fp16_parity_bound=chosen.fp16_parity_bound,
        fallback=chosen.fallback,
        cuda_graphs=chosen.cuda_graphs,
        merge_after=chosen.merge_after,
        weights_validation=chosen.weights_validation,
        compile=chosen.compile,
        autotune=chosen.autotune,
        search_convolutions=chosen.search_convolutions,
        attention=chosen.attention,
        kernels=chosen.kernels,
        merged_slots=chosen.merged_slots,
        slot_weights_bytes=chosen.slot_weights_bytes,
        warm_sizes=chosen.warm_sizes,
        most_graphs=chosen.most_graphs,
        vae_tiling_above=chosen.vae_tiling_above,
        max_size=settings.limits.max_size,
        cache_dir=settings.store.cache_path.expanduser(),
    )
