"""Checks of GenerateRequest: every wrong field is named in one answer, with what was given and what is allowed."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from hueshift.engines.base_model import BaseModel
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.samplers import SamplerKind
from hueshift.server.generation import LagRequest
from hueshift.server.rpc.adapter_uses import WantedAdapter, check_uses
from hueshift.server.rpc.checker import Checker
from hueshift.server.rpc.generation_guides import (
    MAX_PROMPT,
    Abilities,
    WantedRegion,
    check_lag,
    check_plan,
    check_regions,
    check_room,
)
from hueshift.server.rpc.generation_start import (
    INVERSION_GUIDANCE,
    INVERSION_SAMPLER,
    WantedStart,
    check_start,
    inverts,
)
from hueshift.server.rpc.priorities import PRIORITIES
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb

MAX_GUIDANCE = 30.0
SEEDS = 2**64
DEFAULT_SAMPLER = SamplerKind.DPMPP_2M

SAMPLERS: Mapping["pb.Sampler.ValueType", SamplerKind] = {
    pb.SAMPLER_DDIM: SamplerKind.DDIM,
    pb.SAMPLER_EULER: SamplerKind.EULER,
    pb.SAMPLER_DPMPP_2M: SamplerKind.DPMPP_2M,
    pb.SAMPLER_LCM: SamplerKind.LCM,
}
_FORMATS: Mapping["pb.ImageFormat.ValueType", PictureFormat] = {
    pb.IMAGE_FORMAT_UNSPECIFIED: PictureFormat.PNG,
    pb.IMAGE_FORMAT_PNG: PictureFormat.PNG,
    pb.IMAGE_FORMAT_WEBP: PictureFormat.WEBP,
    pb.IMAGE_FORMAT_JPEG: PictureFormat.JPEG,
}


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request whose every field is allowed, with the defaults filled in."""

    adapters: tuple[WantedAdapter, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    sampler: SamplerKind
    eta: float
    width: int
    height: int
    format: PictureFormat
    preview_interval: int
    priority: int
    lag: LagRequest | None = None
    regions: tuple[WantedRegion, ...] = ()
    start: WantedStart | None = None


def check_request(
    request: pb.GenerateRequest, tenant: str, limits: LimitSettings, base: BaseModel, engine: Abilities
) -> CheckedRequest:
    """Check a request of `tenant` to this engine.

    Raises InvalidArgument with a violation for each wrong field, NotFound on another tenant's adapter name,
    FailedPrecondition (PLAN_UNAVAILABLE) if the engine cannot do what is asked.
    """
    check = Checker()
    _check_text(check, request)
    count = check.whole("count", request.count, 1, limits.max_count, default=1)
    left_open = INVERSION_SAMPLER if inverts(request) else DEFAULT_SAMPLER
    sampler = check.choice("sampler", request.sampler, {pb.SAMPLER_UNSPECIFIED: left_open, **SAMPLERS}, "Sampler")
    width = _check_size(check, "width", request.width, limits, base)
    height = _check_size(check, "height", request.height, limits, base)
    checked = CheckedRequest(
        adapters=check_uses(check, request.adapters, "adapters", tenant, limits, base.layout),
        seeds=_check_seeds(check, request, count),
        steps=check.whole("steps", request.steps, 1, limits.max_steps, default=limits.default_steps),
        guidance_scale=_check_guidance(check, request, limits),
        sampler=sampler,
        eta=_check_eta(check, request, sampler),
        width=width,
        height=height,
        format=check.choice("format", request.format, _FORMATS, "ImageFormat"),
        preview_interval=check.whole("preview_interval", request.preview_interval, 1, limits.max_steps, default=0),
        priority=check.choice("priority", request.priority, PRIORITIES, "Priority"),
        lag=check_lag(check, request),
        regions=check_regions(check, request, tenant, limits, base.layout, (width, height)),
        start=check_start(check, request, limits),
    )
    check_room(check, request, count, 2 if checked.guidance_scale > 1 else 1, engine)
    check.done()
    check_plan(request, engine)
    return checked


def _check_text(check: Checker, request: pb.GenerateRequest) -> None:
    if not request.prompt.strip():
        check.wrong("prompt", "empty; say what the picture shows")
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > MAX_PROMPT:
            check.wrong(field, f"{len(text)} characters given; allowed: at most {MAX_PROMPT}")


def _check_seeds(check: Checker, request: pb.GenerateRequest, count: int) -> tuple[int, ...]:
    given = len(request.seeds)
    if given == 0:
        return tuple(secrets.randbits(64) for _ in range(count))
    if given == 1:
        return tuple((request.seeds[0] + index) % SEEDS for index in range(count))
    if given != count:
        check.wrong("seeds", f"{given} seeds given for {count} pictures; allowed: none, one, or one for each picture")
    return tuple(request.seeds[:count])


def _check_guidance(check: Checker, request: pb.GenerateRequest, limits: LimitSettings) -> float:
    if not request.HasField("guidance_scale"):
        return INVERSION_GUIDANCE if inverts(request) else limits.default_guidance_scale
    scale = request.guidance_scale
    if not (math.isfinite(scale) and 1 <= scale <= MAX_GUIDANCE):
        check.wrong("guidance_scale", f"{scale:g} given; allowed: 1 (off) to {MAX_GUIDANCE:g}")
    return scale


def _check_eta(check: Checker, request: pb.GenerateRequest, sampler: SamplerKind) -> float:
    if not (math.isfinite(request.eta) and 0 <= request.eta <= 1):
        check.wrong("eta", f"{request.eta:g} given; allowed: 0 to 1")
    elif request.eta != 0 and sampler is not SamplerKind.DDIM:
        check.wrong("eta", f"{request.eta:g} given with sampler {sampler}; only SAMPLER_DDIM takes eta")
    return request.eta


def _check_size(check: Checker, field: str, value: int, limits: LimitSettings, base: BaseModel) -> int:
    if value == 0:
        return base.pixels
    step, high = base.size_multiple, max(limits.max_size, base.pixels)
    if value % step or not step <= value <= high:
        check.wrong(
            field,
            f"{value} given; allowed: multiples of {step} up to {high // step * step}, or 0 for {base.pixels}",
        )
        return base.pixels
    return value
