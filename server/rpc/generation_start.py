"""Checks of the picture that a request starts from, and of its inversion."""

import math
from dataclasses import dataclass

from hueshift.engines.samplers import SamplerKind
from hueshift.server.generation import InversionRequest
from hueshift.server.rpc.checker import Checker
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb

MAX_START_BYTES = 4 * 1024 * 1024
# Keeps a picture's composition and lets its content change: what diffusers' img2img takes too.
DEFAULT_STRENGTH = 0.8
# What Han et al. 2023 invert and sample with (section 3.5).
INVERSION_STEPS = 50
INVERSION_GUIDANCE = 3.0
INVERSION_SAMPLER = SamplerKind.DDIM


@dataclass(frozen=True, slots=True)
class WantedStart:
    """What a checked request starts from; the picture is the caller's own file."""

    data: bytes
    strength: float
    inversion: InversionRequest | None


def default_inversion_steps(limits: LimitSettings) -> int:
    """Steps of an inversion that gives none."""
    return min(INVERSION_STEPS, limits.max_steps)


def inverts(request: pb.GenerateRequest) -> bool:
    """True if the request asks for an inversion."""
    return request.HasField("picture") and request.picture.HasField("inversion")


def check_start(check: Checker, request: pb.GenerateRequest, limits: LimitSettings) -> WantedStart | None:
    """Check `picture`; None if it is absent. What is wrong goes to `check`."""
    if not request.HasField("picture"):
        return None
    picture = request.picture
    if not 1 <= len(picture.data) <= MAX_START_BYTES:
        check.wrong("picture.data", f"{len(picture.data)} bytes given; allowed: 1 to {MAX_START_BYTES}")
    inversion = _check_inversion(check, request, limits) if picture.HasField("inversion") else None
    strength = 1.0 if inversion is not None else DEFAULT_STRENGTH
    if picture.HasField("strength"):
        # On the wire it has 32 bits: 0.8 of 20 steps must be 16, not one more.
        strength = max(round(picture.strength, 6), 1e-6) if picture.strength > 0 else picture.strength
        if not (math.isfinite(strength) and 0 < strength <= 1):
            check.wrong("picture.strength", f"{strength:g} given; allowed: above 0, up to 1 (changes everything)")
            strength = 1.0
    return WantedStart(picture.data, strength, inversion)


def _check_inversion(check: Checker, request: pb.GenerateRequest, limits: LimitSettings) -> InversionRequest:
    inversion, path = request.picture.inversion, "picture.inversion"
    share = inversion.noise_share
    if not (math.isfinite(share) and 0 <= share <= 1):
        check.wrong(f"{path}.noise_share", f"{share:g} given; allowed: 0 (the picture's own noise) to 1 (the seed's)")
    if request.shared_attention:
        check.wrong(
            "shared_attention",
            "given with an inversion, which the request's first picture does for all; leave out either, or start from "
            "the picture without inversion",
        )
    if request.regions:
        check.wrong(
            "regions",
            "given with an inversion, which has one prompt for the whole picture; leave out either, or start from the "
            "picture without inversion",
        )
    steps = check.whole(f"{path}.steps", inversion.steps, 1, limits.max_steps, default=default_inversion_steps(limits))
    return InversionRequest(steps, share, inversion.report_error)
