"""The picture a GenerateRequest starts from: what is allowed, and what the answer says otherwise."""

import math
from typing import Any

import pytest
from fake_engine import FakeEngine

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.samplers import SamplerKind
from hueshift.server.generation import InversionRequest
from hueshift.server.rpc.generation_checks import CheckedRequest, check_request
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb

WHOLE = pb.Box(width=128, height=128)
INVERT = pb.Inversion()


def check(base: BaseModel, **fields: Any) -> CheckedRequest:
    request = pb.GenerateRequest(**{"prompt": "a fox", **fields})
    limits = LimitSettings(max_steps=40)
    return check_request(request, "acme", limits, base, FakeEngine(max_batch=8))


def start(**fields: Any) -> pb.StartPicture:
    return pb.StartPicture(**{"data": b"png", **fields})


def test_defaults(base_model: BaseModel) -> None:
    assert check(base_model).start is None
    plain = check(base_model, picture=start())
    assert plain.start is not None
    assert (plain.start.data, plain.start.strength, plain.start.inversion) == (b"png", 0.8, None)
    assert (plain.sampler, plain.guidance_scale) == (SamplerKind.DPMPP_2M, 5.0)
    edit = check(base_model, picture=start(inversion=INVERT))
    assert edit.start is not None
    # Fifty steps, but no more than the server allows.
    assert (edit.start.strength, edit.start.inversion) == (1.0, InversionRequest(40))
    assert (edit.sampler, edit.guidance_scale, edit.eta) == (SamplerKind.DDIM, 3.0, 0.0)


def test_everything_given(base_model: BaseModel) -> None:
    inversion = pb.Inversion(steps=9, noise_share=0.25, report_error=True)
    checked = check(
        base_model,
        picture=start(strength=0.7, inversion=inversion),
        sampler=pb.SAMPLER_EULER,
        guidance_scale=2,
        adapters=[pb.AdapterUse(adapter="fox")],
        lag=pb.LagSampling(),
    )
    assert checked.start is not None
    # As given, not as 32 bits hold it: 0.7 of 10 steps are 7.
    assert checked.start.strength == 0.7
    assert checked.start.inversion == InversionRequest(9, 0.25, True)
    assert (checked.sampler, checked.guidance_scale) == (SamplerKind.EULER, 2.0)
    region = pb.Region(box=WHOLE)
    assert check(base_model, picture=start(), regions=[region]).regions
    assert check(base_model, picture=start(), shared_attention=True, count=2).start is not None


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"picture": pb.StartPicture()}, {"picture.data"}),
        ({"picture": start(data=b"x" * (4 * 1024 * 1024 + 1))}, {"picture.data"}),
        ({"picture": start(strength=0)}, {"picture.strength"}),
        ({"picture": start(strength=-0.5)}, {"picture.strength"}),
        ({"picture": start(strength=1.1)}, {"picture.strength"}),
        ({"picture": start(strength=math.nan)}, {"picture.strength"}),
        ({"picture": start(inversion=pb.Inversion(steps=41))}, {"picture.inversion.steps"}),
        ({"picture": start(inversion=pb.Inversion(steps=-1))}, {"picture.inversion.steps"}),
        ({"picture": start(inversion=pb.Inversion(noise_share=1.5))}, {"picture.inversion.noise_share"}),
        ({"picture": start(inversion=pb.Inversion(noise_share=math.nan))}, {"picture.inversion.noise_share"}),
        ({"picture": start(inversion=INVERT), "shared_attention": True, "count": 2}, {"shared_attention"}),
        ({"picture": start(inversion=INVERT), "regions": [pb.Region(box=WHOLE)]}, {"regions"}),
        ({"picture": start(inversion=INVERT), "sampler": pb.SAMPLER_EULER, "eta": 0.5}, {"eta"}),
        (
            {"picture": start(strength=2, inversion=pb.Inversion(steps=99)), "prompt": ""},
            {
                "picture.strength",
                "picture.inversion.steps",
                "prompt",
            },
        ),
    ],
)
def test_wrong_fields_are_named(base_model: BaseModel, fields: dict[str, Any], wrong: set[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(base_model, **fields)
    assert {violation.field for violation in caught.value.violations} == wrong
