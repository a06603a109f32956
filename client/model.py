"""The base model: its record and the calls of ModelService."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hueshift.client.calls import Page, Paged, Unary
from hueshift.client.choices import Method, Sampler
from hueshift.client.job_spec import Setting, read_settings
from hueshift.client.wire import from_enum, known_enums, optional
from hueshift.v1 import finetune_pb2, generation_pb2
from hueshift.v1 import model_pb2 as pb


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A fine-tuning method and what a job uses where its settings are absent."""

    method: Method
    subject_defaults: Mapping[str, Setting]
    style_defaults: Mapping[str, Setting]
    edit_defaults: Mapping[str, Setting]
    """Empty where the method cannot be used for edits."""


@dataclass(frozen=True, slots=True)
class SizeCapacity:
    """UNet rows of one call that fit in the device's memory, at a picture size in pixels."""

    width: int
    height: int
    rows: int


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What an engine holds and runs at a time; a picture with guidance takes two UNet rows.

    `buckets` are the rows that calls are filled up to, none where they take any number; `sizes` are empty where the
    engine did not measure what fits.
    """

    max_rows: int
    adapter_slots: int
    merged_slots: int
    buckets: tuple[int, ...]
    sizes: tuple[SizeCapacity, ...]
    dense_slots: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A base model, its defaults and limits, as in the contract's Model, less samplers newer than this client."""

    name: str
    base_hash: str
    engine: str
    plans: tuple[str, ...]
    samplers: tuple[Sampler, ...]
    default_sampler: Sampler | None
    default_steps: int
    default_guidance_scale: float
    width: int
    height: int
    size_multiple: int
    max_size: int
    max_count: int
    max_steps: int
    max_tokens: int
    batch_capacity: int
    methods: tuple[MethodInfo, ...]
    default_identifier: str
    max_adapter_bytes: int
    max_picture_bytes: int
    max_pictures: int
    lag: bool
    shared_attention: bool
    max_regions: int
    max_start_bytes: int
    default_strength: float
    default_inversion_steps: int
    default_inversion_guidance_scale: float
    architecture: str
    """`stable-diffusion` or `stable-diffusion-xl`; empty from servers older than this client."""
    capacity: EngineCapacity | None = None
    """None from servers older than this client."""


def get_call(name: str) -> Unary[pb.GetModelRequest, pb.GetModelResponse, Model]:
    """Return one model; an empty name is the default one."""
    return Unary(lambda s: s.model.GetModel, pb.GetModelRequest(name=name), lambda r: read_model(r.model))


def list_call(page_size: int) -> Paged[Model]:
    """Return the models page by page."""

    def page(token: str) -> Unary[Any, Any, Page[Model]]:
        request = pb.ListModelsRequest(page_size=page_size, page_token=token)
        return Unary(lambda s: s.model.ListModels, request, _read_page)

    return page


def read_model(message: pb.Model) -> Model:
    """Return the record of a message."""
    plain = (
        "name base_hash engine default_steps default_guidance_scale width height size_multiple max_size max_count "
        "max_steps max_tokens batch_capacity default_identifier max_adapter_bytes max_picture_bytes max_pictures "
        "lag shared_attention max_regions max_start_bytes default_strength default_inversion_steps "
        "default_inversion_guidance_scale architecture"
    )
    return Model(
        plans=tuple(message.plans),
        samplers=read_samplers(message.samplers),
        default_sampler=next(iter(read_samplers([message.default_sampler])), None),
        methods=tuple(_read_method(m) for m in message.methods),
        capacity=optional(message.HasField("capacity"), lambda: _read_capacity(message.capacity)),
        **{name: getattr(message, name) for name in plain.split()},
    )


def read_samplers(numbers: Sequence[generation_pb2.Sampler.ValueType]) -> tuple[Sampler, ...]:
    """Return the samplers this client knows; newer ones are left out."""
    return known_enums(generation_pb2.Sampler, "SAMPLER", Sampler, numbers)


def _read_capacity(message: pb.EngineCapacity) -> EngineCapacity:
    return EngineCapacity(
        max_rows=message.max_rows,
        adapter_slots=message.adapter_slots,
        merged_slots=message.merged_slots,
        dense_slots=message.dense_slots,
        buckets=tuple(message.buckets),
        sizes=tuple(SizeCapacity(size.width, size.height, size.rows) for size in message.sizes),
    )


def _read_method(message: pb.MethodInfo) -> MethodInfo:
    return MethodInfo(
        method=from_enum(finetune_pb2.FineTuneMethod, "FINE_TUNE_METHOD", Method, message.method, Method.UNKNOWN),
        subject_defaults=read_settings(message.subject_defaults),
        style_defaults=read_settings(message.style_defaults),
        edit_defaults=read_settings(message.edit_defaults),
    )


def _read_page(message: pb.ListModelsResponse) -> Page[Model]:
    return Page(tuple(read_model(m) for m in message.models), message.next_page_token)
