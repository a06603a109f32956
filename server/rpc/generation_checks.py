"""Checks of GenerateRequest: every wrong field is named in one answer, with what was given and what is allowed."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from hueshift.adapters.errors import FieldViolation, HueshiftError, InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.samplers import SamplerKind
from hueshift.server.rpc.names import parse_adapter_name
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb

MAX_PROMPT = 2000
MAX_WEIGHT = 2.0
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
_PRIORITIES: Mapping["pb.Priority.ValueType", int] = {
    pb.PRIORITY_UNSPECIFIED: 0,
    pb.PRIORITY_LOW: -1,
    pb.PRIORITY_NORMAL: 0,
    pb.PRIORITY_HIGH: 1,
}

_Number = TypeVar("_Number", bound=int)
_Choice = TypeVar("_Choice")


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """An adapter of a checked request, not looked up yet. `revision` 0 means the newest."""

    adapter_id: str
    given: str
    revision: int
    weight: float


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


def check_request(request: pb.GenerateRequest, tenant: str, limits: LimitSettings, base: BaseModel) -> CheckedRequest:
    """Check a request of `tenant`.

    Raises InvalidArgument with a violation for each wrong field, NotFound on another tenant's adapter name.
    """
    check = _Checker()
    _check_text(check, request)
    count = check.whole("count", request.count, 1, limits.max_count, default=1)
    sampler = check.choice("sampler", request.sampler, {pb.SAMPLER_UNSPECIFIED: DEFAULT_SAMPLER, **SAMPLERS}, "Sampler")
    checked = CheckedRequest(
        adapters=_check_adapters(check, request, tenant, limits),
        seeds=_check_seeds(check, request, count),
        steps=check.whole("steps", request.steps, 1, limits.max_steps, default=limits.default_steps),
        guidance_scale=_check_guidance(check, request, limits),
        sampler=sampler,
        eta=_check_eta(check, request, sampler),
        width=_check_size(check, "width", request.width, limits, base),
        height=_check_size(check, "height", request.height, limits, base),
        format=check.choice("format", request.format, _FORMATS, "ImageFormat"),
        preview_interval=check.whole("preview_interval", request.preview_interval, 1, limits.max_steps, default=0),
        priority=check.choice("priority", request.priority, _PRIORITIES, "Priority"),
    )
    check.done()
    return checked


class _Checker:
    """Collects violations, so that a caller learns of all of them at once."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []
        self._not_found: HueshiftError | None = None

    def wrong(self, field: str, description: str) -> None:
        self._violations.append(FieldViolation(field, description))

    def take(self, error: HueshiftError) -> None:
        """Keep an error raised by another check: its violations, or itself if it has none (NotFound)."""
        if error.violations:
            self._violations.extend(error.violations)
        elif self._not_found is None:
            self._not_found = error

    def whole(self, field: str, value: int, low: int, high: int, *, default: int) -> int:
        """Return `value`, or the default for 0."""
        if value == 0:
            return default
        if not low <= value <= high:
            self.wrong(field, f"{value} given; allowed: {low} to {high}, or 0 for the default ({default})")
            return default
        return value

    def choice(self, field: str, value: _Number, choices: Mapping[_Number, _Choice], enum: str) -> _Choice:
        """Return what an enum value stands for."""
        if value not in choices:
            names = pb.DESCRIPTOR.enum_types_by_name[enum].values_by_number
            allowed = ", ".join(names[number].name for number in choices)
            self.wrong(field, f"{value} is not a value of this server's contract; allowed: {allowed}")
            return next(iter(choices.values()))
        return choices[value]

    def done(self) -> None:
        """Raise what was found: wrong fields first, for a malformed request tells nothing of what exists."""
        if self._violations:
            text = "; ".join(f"{v.field}: {v.description}" for v in self._violations)
            raise InvalidArgument(Reason.INVALID_FIELD, text, violations=self._violations)
        if self._not_found is not None:
            raise self._not_found


def _check_text(check: _Checker, request: pb.GenerateRequest) -> None:
    if not request.prompt.strip():
        check.wrong("prompt", "empty; say what the picture shows")
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > MAX_PROMPT:
            check.wrong(field, f"{len(text)} characters given; allowed: at most {MAX_PROMPT}")


def _check_adapters(
    check: _Checker, request: pb.GenerateRequest, tenant: str, limits: LimitSettings
) -> tuple[WantedAdapter, ...]:
    if len(request.adapters) > limits.max_adapters:
        check.wrong("adapters", f"{len(request.adapters)} given; allowed: at most {limits.max_adapters}")
        return ()
    wanted: dict[str, WantedAdapter] = {}
    for index, use in enumerate(request.adapters):
        path = f"adapters[{index}]"
        weight = use.weight if use.HasField("weight") else 1.0
        if not (math.isfinite(weight) and abs(weight) <= MAX_WEIGHT):
            check.wrong(f"{path}.weight", f"{weight:g} given; allowed: {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        if use.revision < 0:
            check.wrong(f"{path}.revision", f"{use.revision} given; allowed: 1 or more, or 0 for the newest")
        try:
            adapter_id = parse_adapter_name(use.adapter, tenant, f"{path}.adapter")
        except HueshiftError as error:
            check.take(error)
            continue
        if adapter_id in wanted:
            check.wrong(f"{path}.adapter", f"{adapter_id!r} is named twice; name it once with the sum of the weights")
        wanted[adapter_id] = WantedAdapter(adapter_id, use.adapter, use.revision, weight)
    return tuple(wanted.values())


def _check_seeds(check: _Checker, request: pb.GenerateRequest, count: int) -> tuple[int, ...]:
    given = len(request.seeds)
    if given == 0:
        return tuple(secrets.randbits(64) for _ in range(count))
    if given == 1:
        return tuple((request.seeds[0] + index) % SEEDS for index in range(count))
    if given != count:
        check.wrong("seeds", f"{given} seeds given for {count} pictures; allowed: none, one, or one for each picture")
    return tuple(request.seeds[:count])


def _check_guidance(check: _Checker, request: pb.GenerateRequest, limits: LimitSettings) -> float:
    if not request.HasField("guidance_scale"):
        return limits.default_guidance_scale
    scale = request.guidance_scale
    if not (math.isfinite(scale) and 1 <= scale <= MAX_GUIDANCE):
        check.wrong("guidance_scale", f"{scale:g} given; allowed: 1 (off) to {MAX_GUIDANCE:g}")
    return scale


def _check_eta(check: _Checker, request: pb.GenerateRequest, sampler: SamplerKind) -> float:
    if not (math.isfinite(request.eta) and 0 <= request.eta <= 1):
        check.wrong("eta", f"{request.eta:g} given; allowed: 0 to 1")
    elif request.eta != 0 and sampler is not SamplerKind.DDIM:
        check.wrong("eta", f"{request.eta:g} given with sampler {sampler}; only SAMPLER_DDIM takes eta")
    return request.eta


def _check_size(check: _Checker, field: str, value: int, limits: LimitSettings, base: BaseModel) -> int:
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
