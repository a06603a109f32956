"""GenerationService: one checked call becomes one scheduler request, and its events become the stream."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

import grpc
from google.protobuf.duration_pb2 import Duration

from hueshift.adapters.blocks import BlockWeights
from hueshift.adapters.errors import FailedPrecondition, Reason, ResourceRef
from hueshift.engines.base_model import BaseModel
from hueshift.server.clock import Clock
from hueshift.server.generation import (
    AppliedAdapter,
    GenerationEvent,
    GenerationHandle,
    GenerationRequest,
    ImageEvent,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    RegionRequest,
    StartRequest,
    Timings,
)
from hueshift.server.rpc.adapter_uses import WantedAdapter
from hueshift.server.rpc.call import current_call
from hueshift.server.rpc.generation_checks import CheckedRequest, check_request
from hueshift.server.rpc.generation_guides import Abilities, check_slots
from hueshift.server.rpc.names import adapter_name
from hueshift.server.rpc.region_pictures import RegionPictures
from hueshift.server.settings import LimitSettings, ServerSettings
from hueshift.server.store.adapter_records import RevisionRecord
from hueshift.v1 import generation_pb2 as pb
from hueshift.v1 import generation_pb2_grpc


class Submits(Protocol):
    """The part of the scheduler that is needed here."""

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request; called in the event loop, does not block."""
        ...


class Revisions(Protocol):
    """The part of the adapter store that is needed here."""

    def revision(self, tenant: str, adapter_id: str, number: int = 0) -> RevisionRecord:
        """Return a revision of a tenant's adapter; reads the database."""
        ...


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Generates pictures."""

    def __init__(
        self,
        scheduler: Submits,
        adapters: Revisions,
        base: BaseModel,
        limits: LimitSettings,
        server: ServerSettings,
        clock: Clock,
        engine: Abilities,
    ) -> None:
        self._engine = engine
        self._masks = RegionPictures()
        self._scheduler = scheduler
        self._adapters = adapters
        self._base = base
        self._limits = limits
        self._server = server
        self._clock = clock

    async def Generate(
        self, request: pb.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Generate pictures; see the contract."""
        call = current_call()
        checked = check_request(request, call.tenant, self._limits, self._base, self._engine)
        applied, *of_regions = await asyncio.to_thread(
            self._resolve_all, call.tenant, (checked.adapters, *(region.adapters for region in checked.regions))
        )
        areas = await self._masks.sanitise([region.area for region in checked.regions], call.tenant)
        start = await self._start(checked, call.tenant)
        deadline = call.deadline
        if deadline is None:
            deadline = self._clock.monotonic() + self._server.default_deadline_seconds
        made = replace(
            _to_generation(request, checked, applied, call.request_id, call.tenant, deadline),
            regions=tuple(
                RegionRequest(region.prompt, adapters, area, region.feather)
                for region, adapters, area in zip(checked.regions, of_regions, areas, strict=True)
            ),
            start=start,
        )
        check_slots(made, self._engine)
        handle = self._scheduler.submit(made)
        # Closing the events is what gives the places in the batch back when the caller has gone.
        async with aclosing(handle.events()) as events:
            async for event in events:
                yield _to_response(event, call.request_id)

    async def _start(self, checked: CheckedRequest, tenant: str) -> StartRequest | None:
        wanted = checked.start
        if wanted is None:
            return None
        picture = await self._masks.sanitise_start(wanted.data, checked.width, checked.height, tenant)
        return StartRequest(picture, wanted.strength, wanted.inversion, hashlib.sha256(wanted.data).hexdigest())

    def _resolve_all(self, tenant: str, mixes: Sequence[tuple[WantedAdapter, ...]]) -> list[tuple[AppliedAdapter, ...]]:
        return [self._resolve(tenant, wanted) for wanted in mixes]

    def _resolve(self, tenant: str, wanted: tuple[WantedAdapter, ...]) -> tuple[AppliedAdapter, ...]:
        """Look the adapters up within the tenant, at every call: a right that was taken away counts at once."""
        found = []
        for adapter in wanted:
            record = self._adapters.revision(tenant, adapter.adapter_id, adapter.revision)
            name = adapter_name(tenant, adapter.adapter_id)
            if record.base_hash != self._base.base_hash:
                raise FailedPrecondition(
                    Reason.ADAPTER_BASE_MISMATCH,
                    f"adapter {name!r} belongs to the base model {record.base_hash[:12]}, this server runs "
                    f"{self._base.base_hash[:12]}; fine-tune it again here",
                    resource=ResourceRef("hueshift.v1/adapters", name),
                )
            found.append(_apply(adapter, name, record))
        return tuple(found)


def _apply(adapter: WantedAdapter, name: str, record: RevisionRecord) -> AppliedAdapter:
    blocks = adapter.blocks
    if isinstance(blocks, BlockWeights):
        return AppliedAdapter(name, record.revision, record.content_hash, adapter.weight, blocks)
    return AppliedAdapter(name, record.revision, record.content_hash, adapter.weight * blocks)


def _to_generation(
    request: pb.GenerateRequest,
    checked: CheckedRequest,
    applied: tuple[AppliedAdapter, ...],
    request_id: str,
    tenant: str,
    deadline: float,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        tenant=tenant,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        adapters=applied,
        seeds=checked.seeds,
        steps=checked.steps,
        guidance_scale=checked.guidance_scale,
        sampler=checked.sampler,
        eta=checked.eta,
        width=checked.width,
        height=checked.height,
        format=checked.format,
        preview_interval=checked.preview_interval,
        priority=checked.priority,
        deadline=deadline,
        lag=checked.lag,
        shared_attention=request.shared_attention,
    )


def _to_response(event: GenerationEvent, request_id: str) -> pb.GenerateResponse:
    if isinstance(event, QueuedEvent):
        return pb.GenerateResponse(queued=pb.Queued(position=event.position, request_id=request_id))
    if isinstance(event, ProgressEvent):
        return pb.GenerateResponse(progress=pb.Progress(step=event.step, of=event.of))
    if isinstance(event, PreviewEvent):
        preview = pb.Preview(index=event.index, step=event.step, data=event.data, media_type=event.media_type)
        return pb.GenerateResponse(preview=preview)
    if isinstance(event, ImageEvent):
        return pb.GenerateResponse(image=_to_image(event))
    finished = pb.Finished(
        images=event.images,
        total=_duration(event.total_seconds),
        truncated_tokens=event.truncated_tokens,
        request_id=request_id,
        inversion_error=event.inversion_error,
    )
    return pb.GenerateResponse(finished=finished)


def _to_image(event: ImageEvent) -> pb.Image:
    return pb.Image(
        index=event.index,
        data=event.data,
        media_type=event.media_type,
        seed=event.seed,
        width=event.width,
        height=event.height,
        adapters=[_to_applied(adapter) for adapter in event.adapters],
        plans=[plan.value for plan in event.plans],
        engine=event.engine,
        base_hash=event.base_hash,
        timings=_to_timings(event.timings),
        mask=event.mask,
        regions=[pb.AppliedRegion(adapters=[_to_applied(a) for a in adapters]) for adapters in event.regions],
    )


def _to_applied(adapter: AppliedAdapter) -> pb.AppliedAdapter:
    return pb.AppliedAdapter(
        adapter=adapter.name,
        revision=adapter.revision,
        content_hash=adapter.content_hash,
        weight=adapter.weight,
        block_weights=dict(adapter.blocks.entries) if adapter.blocks else {},
    )


def _to_timings(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queue=_duration(timings.queue),
        adapter_load=_duration(timings.adapter_load),
        text=_duration(timings.text),
        denoise=_duration(timings.denoise),
        decode=_duration(timings.decode),
        picture=_duration(timings.picture),
        inversion=_duration(timings.inversion),
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration
