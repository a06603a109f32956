"""The services over one engine and one set of stores, and what runs beside them in the background."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from torch import Tensor

from hueshift.adapters.errors import HueshiftError
from hueshift.adapters.formats.draft import ImportBase
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import choose_device
from hueshift.engines.conditioning import make_conditioner
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import lane_of
from hueshift.engines.cuda_setup import planner_of
from hueshift.engines.encoder_layers import encoder_parameters
from hueshift.engines.half_decoder import serving_decoder
from hueshift.engines.interface import UNetEngine, dense_slots
from hueshift.engines.residency import SlotCache
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.vae import VaeStage
from hueshift.server.clock import Clock
from hueshift.server.file_threads import FileThreads
from hueshift.server.metrics import Metrics
from hueshift.server.residency_metrics import ResidencyMetrics
from hueshift.server.rpc.adapter_import import AdapterFormats
from hueshift.server.rpc.adapter_service import AdapterService
from hueshift.server.rpc.finetune_service import FineTuneService
from hueshift.server.rpc.finetune_targets import make_target_fit
from hueshift.server.rpc.finetune_words import make_word_check
from hueshift.server.rpc.generation_service import GenerationService
from hueshift.server.rpc.handlers import ServiceTable
from hueshift.server.rpc.model_service import ModelService
from hueshift.server.scheduler import Scheduler
from hueshift.server.settings import Settings
from hueshift.server.store.job_removal import JobRemoval
from hueshift.server.store.stores import Stores
from hueshift.server.supervisor import Supervisor
from hueshift.training.cost import open_speeds
from hueshift.v1 import adapters_pb2_grpc, finetune_pb2_grpc, generation_pb2_grpc, model_pb2_grpc


@dataclass(frozen=True)
class ServingParts:
    """What draws pictures: the base model, an engine over it, and how adapters become the engine's rows.

    `norms` are the base's norm weights by layer.
    """

    base: BaseModel
    engine: UNetEngine
    rows: RowLayout
    factors: SpectralFactors
    norms: Mapping[str, Tensor]


class ServiceSet:
    """Every service of the contract, the scheduler they share, and the workers.

    Made in any thread; the methods belong to the event loop.
    """

    def __init__(self, settings: Settings, stores: Stores, metrics: Metrics, clock: Clock, parts: ServingParts) -> None:
        base, engine, limits = parts.base, parts.engine, settings.limits
        observer = ResidencyMetrics(metrics)
        host = HostCache(lambda key: stores.adapters.load(key, base.layout), limits.host_cache_bytes, observer)
        slots = SlotCache(
            engine,
            _row_cache(settings, parts, host, observer),
            observer,
        )
        dtype = engine.dtype if isinstance(engine, CudaEngine) else None
        # Pictures that requests start from are encoded beside the steps, as prompts are.
        vae_lane = lane_of(next(base.vae.parameters()).device)
        conditioner = make_conditioner(base, parts.factors, observer, dtype=dtype)
        self.scheduler = Scheduler(
            engine,
            base,
            conditioner,
            VaeStage(
                base,
                tile_above=settings.engine.vae_tiling_above,
                lane=vae_lane,
                half=serving_decoder(base, fuse=settings.engine.kernels != "off"),
            ),
            slots,
            metrics,
            clock,
            limits,
            weights=limits.tenant_weights,
            planner=planner_of(engine),
            find_planner=partial(planner_of, engine),
        )
        self._generation = GenerationService(
            self.scheduler, stores.adapters, base, limits, settings.server, clock, engine
        )
        formats = AdapterFormats(
            ImportBase(base.layout, {**dict(base.unet.named_parameters()), **encoder_parameters(base)}),
            parts.rows.served_ranks,
            lambda: dense_slots(parts.engine),
        )
        self._files = FileThreads()
        self._adapters = AdapterService(
            stores.adapters, base.layout, limits, self.scheduler, clock, formats, stores.folders.remove, self._files
        )
        self._fine_tunes = _fine_tunes(settings, stores, metrics, parts, self._files)
        self._metrics, self._clock = metrics, clock
        self._following: asyncio.Task[None] | None = None
        self._models = ModelService(base, engine, settings)
        self._supervisor = Supervisor(settings, jobs=stores.jobs, folders=stores.folders, metrics=metrics, clock=clock)

    def register(self, table: ServiceTable) -> None:
        """Add the services to the table."""
        registrar: Any = table
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, registrar)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self._adapters, registrar)
        finetune_pb2_grpc.add_FineTuneServiceServicer_to_server(self._fine_tunes, registrar)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self._models, registrar)

    async def start(self) -> None:
        """Start the step loop, bring the pinned adapters in, start the workers."""
        self.scheduler.start()
        pinned = await self._adapters.pins.follow()
        self._following = asyncio.create_task(
            self._adapters.pins.keep(observer=self._metrics, clock=self._clock), name="pins"
        )
        await self._supervisor.start()
        structlog.get_logger().info("services started", pinned_adapters=pinned)

    async def failure(self) -> HueshiftError:
        """Wait until the device that draws is lost, and return what to say of it."""
        # Shielded: whoever stops waiting must not cancel what the step loop looks at.
        return await asyncio.shield(asyncio.wrap_future(self.scheduler.watch.lost))

    async def stop_workers(self, grace: float) -> None:
        """Let the workers write checkpoints and put their jobs back; kill those alive after `grace` seconds."""
        await self._supervisor.stop(grace)

    async def close(self) -> None:
        """Stop the step loop. Requests that are still in it end with Unavailable (DRAINING)."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await asyncio.to_thread(self.scheduler.close)
        self._files.close()


def _row_cache(settings: Settings, parts: ServingParts, host: HostCache, observer: ResidencyMetrics) -> RowCache:
    # Whatever engine is on the GPU: before ordinary memory is copied the host waits for every step that is queued.
    pinned = choose_device(settings.engine.device, parts.base).type == "cuda"
    most = settings.limits.row_cache_bytes
    return RowCache(host, parts.rows, parts.factors, parts.norms, most, observer, pinned=pinned)


def _fine_tunes(
    settings: Settings, stores: Stores, metrics: Metrics, parts: ServingParts, files: FileThreads
) -> FineTuneService:
    base, speeds = parts.base, open_speeds(settings.store.cache_path)
    return FineTuneService(
        stores.jobs,
        stores.folders,
        settings.limits,
        default_identifier=settings.model.default_identifier,
        check_words=make_word_check(base),
        fit_targets=make_target_fit(parts.rows, lambda: dense_slots(parts.engine)),
        estimate=lambda spec: speeds.estimate(base.base_hash, spec),
        on_retry=metrics.job_retries.inc,
        removal=JobRemoval(stores.database, stores.adapters.storage.quota),
        files=files,
    )
