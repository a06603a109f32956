"""Checks of what a request asks beyond a plain picture: LAG sampling, shared attention, regions."""

import math
from dataclasses import dataclass
from typing import Protocol

from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout
from hueshift.engines.interface import Plan
from hueshift.engines.mixes import make_mix
from hueshift.engines.region_masks import Area, Box
from hueshift.server.generation import GenerationRequest, LagRequest
from hueshift.server.rpc.adapter_uses import WantedAdapter, check_uses
from hueshift.server.rpc.checker import Checker
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb

MAX_REGIONS = 4
MAX_WORDS = 16
MAX_WORD = 64
MAX_FEATHER = 256.0
MAX_MASK_BYTES = 1024 * 1024
MAX_PROMPT = 2000


class Abilities(Protocol):
    """What a request must know of the engine."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans it can run."""
        ...

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        ...

    @property
    def max_batch(self) -> int:
        """UNet rows in one call."""
        ...


@dataclass(frozen=True, slots=True)
class WantedRegion:
    """A region of a checked request: its adapters are not looked up, and a mask is the caller's own file."""

    prompt: str
    adapters: tuple[WantedAdapter, ...]
    area: Area
    feather: float


def max_regions(engine: Abilities) -> int:
    """Most regions of a guided picture: the batch must hold all of its rows."""
    return max(0, min(MAX_REGIONS, engine.max_batch // 2 - 1))


def check_lag(check: Checker, request: pb.GenerateRequest) -> LagRequest | None:
    """Check `lag`; None if it is absent."""
    if not request.HasField("lag"):
        return None
    words = tuple(word.strip() for word in request.lag.words)
    if len(words) > MAX_WORDS:
        check.wrong("lag.words", f"{len(words)} given; allowed: at most {MAX_WORDS}")
        return None
    for number, word in enumerate(words):
        if not 1 <= len(word) <= MAX_WORD:
            check.wrong(f"lag.words[{number}]", f"{len(word)} characters given; allowed: 1 to {MAX_WORD}")
    if not any(use.weight != 0 or not use.HasField("weight") for use in request.adapters):
        check.wrong("lag", "given without adapters that act on the picture; only their low-rank parts can be confined")
    return LagRequest(words, request.lag.return_masks)


def check_regions(
    check: Checker,
    request: pb.GenerateRequest,
    tenant: str,
    limits: LimitSettings,
    layout: BaseLayout,
    size: tuple[int, int],
) -> tuple[WantedRegion, ...]:
    """Check `regions` of a picture of `size` (width, height); what is wrong goes to `check`."""
    if len(request.regions) > MAX_REGIONS:
        check.wrong("regions", f"{len(request.regions)} given; allowed: at most {MAX_REGIONS}")
        return ()
    return tuple(
        WantedRegion(
            prompt=_check_prompt(check, region, f"regions[{index}].prompt") or request.prompt,
            adapters=check_uses(check, region.adapters, f"regions[{index}].adapters", tenant, limits, layout),
            area=_check_area(check, region, f"regions[{index}]", size),
            feather=_check_feather(check, region, f"regions[{index}].feather"),
        )
        for index, region in enumerate(request.regions)
    )


def check_room(check: Checker, request: pb.GenerateRequest, count: int, rows: int, engine: Abilities) -> None:
    """Check that a batch holds what must be in it together: `rows` for the picture itself and each of its regions."""
    regions = len(request.regions)
    picture = rows * (1 + regions)
    if picture > engine.max_batch and 0 < regions <= MAX_REGIONS:
        most = engine.max_batch // rows - 1
        check.wrong(
            "regions",
            f"{regions} given, which makes a picture {picture} UNet rows; allowed: at most {most}, because a batch "
            f"of this server has {engine.max_batch} rows",
        )
    elif request.shared_attention and count > 1 and picture * count > engine.max_batch:
        check.wrong(
            "shared_attention",
            f"{count} pictures of {picture} UNet rows must be in one batch, which has {engine.max_batch} rows here; "
            f"allowed: a count of at most {engine.max_batch // picture} with these settings"
            + (", so none can share; use fewer regions, or guidance_scale 1" if picture * 2 > engine.max_batch else ""),
        )
    if request.shared_attention and count < 2:
        check.wrong("shared_attention", f"given with a count of {count}; allowed: 2 or more pictures, which then share")


def check_slots(request: GenerationRequest, engine: Abilities) -> None:
    """Raise InvalidArgument unless the engine has a slot for each different mix of the picture and its regions."""
    different = len({made for mix in request.mixes if (made := make_mix(mix))})
    if request.regions and different > engine.slots - 1:
        raise InvalidArgument.for_field(
            "regions",
            f"the picture and its regions use {different} different mixes of adapters; allowed: at most "
            f"{engine.slots - 1}, the engine's adapter slots",
        )


def check_plan(request: pb.GenerateRequest, engine: Abilities) -> None:
    """Raise FailedPrecondition (PLAN_UNAVAILABLE) if the engine lacks the plan that the request needs."""
    if Plan.FULL in engine.plans:
        return
    needed = {"lag": request.HasField("lag"), "shared_attention": request.shared_attention}
    asked = [name for name, given in needed.items() if given]
    if asked:
        raise FailedPrecondition(
            Reason.PLAN_UNAVAILABLE,
            f"{' and '.join(asked)}: this needs the full plan, which the {engine.name} engine of this server does not "
            "offer; leave it out, or let the operator set engine.kind to torch or onnxruntime",
        )


def _check_prompt(check: Checker, region: pb.Region, field: str) -> str:
    if len(region.prompt) > MAX_PROMPT:
        check.wrong(field, f"{len(region.prompt)} characters given; allowed: at most {MAX_PROMPT}")
    return region.prompt if region.prompt.strip() else ""


def _check_feather(check: Checker, region: pb.Region, field: str) -> float:
    if not (math.isfinite(region.feather) and 0 <= region.feather <= MAX_FEATHER):
        check.wrong(field, f"{region.feather:g} given; allowed: 0 to {MAX_FEATHER:g} pixels")
        return 0.0
    return region.feather


def _check_area(check: Checker, region: pb.Region, path: str, size: tuple[int, int]) -> Area:
    which = region.WhichOneof("area")
    if which == "mask":
        if not 1 <= len(region.mask) <= MAX_MASK_BYTES:
            check.wrong(f"{path}.mask", f"{len(region.mask)} bytes given; allowed: 1 to {MAX_MASK_BYTES}")
        return region.mask
    box = Box(region.box.x, region.box.y, region.box.width, region.box.height)
    width, height = size
    if which is None:
        check.wrong(path, "neither box nor mask given; one of them says where the region is")
    elif not (
        box.x >= 0
        and box.y >= 0
        and box.width >= 1
        and box.height >= 1
        and box.x + box.width <= width
        and box.y + box.height <= height
    ):
        check.wrong(
            f"{path}.box",
            f"x {box.x}, y {box.y}, width {box.width}, height {box.height} given; allowed: at least one pixel each "
            f"way, within the picture's {width}x{height}",
        )
    return box
