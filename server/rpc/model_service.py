"""ModelService: the base model, its defaults and the server's limits, so that clients need no constants."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc

from hueshift.adapters.errors import Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import MeasuredEngine, MergingEngine, Plan, UNetEngine, dense_slots
from hueshift.server.rpc.finetune_messages import METHOD_NUMBERS
from hueshift.server.rpc.finetune_settings import write_settings
from hueshift.server.rpc.finetune_targets import served_targets
from hueshift.server.rpc.generation_checks import DEFAULT_SAMPLER, SAMPLERS
from hueshift.server.rpc.generation_guides import max_regions
from hueshift.server.rpc.generation_start import (
    DEFAULT_STRENGTH,
    INVERSION_GUIDANCE,
    MAX_START_BYTES,
    default_inversion_steps,
)
from hueshift.server.rpc.names import not_found
from hueshift.server.rpc.pages import check_page_size, decode_token
from hueshift.server.settings import Settings
from hueshift.training.defaults import method_defaults
from hueshift.training.spec import Method, SubjectKind
from hueshift.v1 import finetune_pb2, model_pb2, model_pb2_grpc


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Describes the one base model of this server."""

    def __init__(self, base: BaseModel, engine: UNetEngine, settings: Settings) -> None:
        self._name = base.name
        # Asked for each time: another engine may take over, with plans and a capacity of its own.
        self._describe = partial(describe_model, base, engine, settings)

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> model_pb2.GetModelResponse:
        """Return the model; an empty name means it too."""
        if request.name not in ("", f"models/{self._name}", self._name):
            raise not_found(Reason.MODEL_NOT_FOUND, "models", request.name[:160])
        return model_pb2.GetModelResponse(model=self._describe())

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> model_pb2.ListModelsResponse:
        """Return the model on the first page; a valid token names what follows it, which is nothing."""
        check_page_size(request.page_size)
        after = decode_token(request.page_token)
        return model_pb2.ListModelsResponse(models=[] if after else [self._describe()])


def describe_model(base: BaseModel, engine: UNetEngine, settings: Settings) -> model_pb2.Model:
    """Build the model's record."""
    limits = settings.limits
    default_sampler = next(number for number, kind in SAMPLERS.items() if kind is DEFAULT_SAMPLER)
    return model_pb2.Model(
        name=f"models/{base.name}",
        base_hash=base.base_hash,
        engine=engine.name,
        architecture=base.architecture.value,
        plans=[plan.value for plan in engine.plans],
        samplers=list(SAMPLERS),
        default_sampler=default_sampler,
        default_steps=limits.default_steps,
        default_guidance_scale=limits.default_guidance_scale,
        width=base.pixels,
        height=base.pixels,
        size_multiple=base.size_multiple,
        max_size=max(limits.max_size, base.pixels) // base.size_multiple * base.size_multiple,
        max_count=limits.max_count,
        max_steps=limits.max_steps,
        max_tokens=base.max_tokens,
        batch_capacity=engine.max_batch // 2,
        methods=[
            _describe_method(method, number, served_targets(settings.engine.lowrank_targets))
            for method, number in METHOD_NUMBERS.items()
        ],
        default_identifier=settings.model.default_identifier,
        max_adapter_bytes=limits.max_adapter_bytes,
        max_picture_bytes=limits.max_picture_bytes,
        max_pictures=limits.max_pictures,
        lag=Plan.FULL in engine.plans,
        shared_attention=Plan.FULL in engine.plans,
        max_regions=max_regions(engine),
        max_start_bytes=min(MAX_START_BYTES, settings.server.max_message_bytes),
        default_strength=DEFAULT_STRENGTH,
        default_inversion_steps=default_inversion_steps(limits),
        default_inversion_guidance_scale=INVERSION_GUIDANCE,
        capacity=describe_capacity(engine, base.latent_factor),
    )


def describe_capacity(engine: UNetEngine, latent_factor: int) -> model_pb2.EngineCapacity:
    """Return the message of what an engine holds and runs at a time; `latent_factor` is pixels for each latent."""
    capacity = model_pb2.EngineCapacity(
        max_rows=engine.max_batch,
        adapter_slots=engine.slots - 1,
        merged_slots=engine.weight_slots if isinstance(engine, MergingEngine) else 0,
        dense_slots=dense_slots(engine),
    )
    if isinstance(engine, MeasuredEngine):
        capacity.buckets.extend(engine.buckets)
        for (height, width), rows in sorted(engine.capacity.items()):
            capacity.sizes.add(width=width * latent_factor, height=height * latent_factor, rows=rows)
    return capacity


def _describe_method(
    method: Method, number: "finetune_pb2.FineTuneMethod.ValueType", served: Sequence[str]
) -> model_pb2.MethodInfo:
    return model_pb2.MethodInfo(
        method=number,
        subject_defaults=_defaults(method, SubjectKind.SUBJECT, served),
        style_defaults=_defaults(method, SubjectKind.STYLE, served),
        edit_defaults=None if method is Method.TEXTUAL_INVERSION else _defaults(method, SubjectKind.EDIT, served),
    )


def _defaults(method: Method, subject: SubjectKind, served: Sequence[str]) -> finetune_pb2.FineTuneSettings:
    """Return the training defaults that a caller can set, but for the targets: those depend on what is served."""
    targets = served if method is Method.DREAMBOOTH else None
    return write_settings({**method_defaults(method, subject, targets=targets), "targets": ()})
