"""LAG, shared attention and regions of a GenerateRequest: what is allowed, and what the answer says otherwise."""

import io
import math
from typing import Any

import pytest
from fake_engine import FakeEngine
from generation_bench import Bench
from PIL import Image

from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, NotFound, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Plan
from hueshift.engines.region_masks import Area, Box
from hueshift.server.generation import LagRequest
from hueshift.server.rpc.adapter_uses import WantedAdapter
from hueshift.server.rpc.generation_checks import CheckedRequest, check_request
from hueshift.server.rpc.generation_guides import WantedRegion, check_slots, max_regions
from hueshift.server.rpc.region_pictures import RegionPictures
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb

FOX = pb.AdapterUse(adapter="fox")
WHOLE = pb.Box(width=128, height=128)


def check(base: BaseModel, engine: FakeEngine | None = None, **fields: Any) -> CheckedRequest:
    request = pb.GenerateRequest(**{"prompt": "a fox", **fields})
    return check_request(request, "acme", LimitSettings(), base, engine or FakeEngine(max_batch=8))


def test_nothing_asked_is_nothing(base_model: BaseModel) -> None:
    checked = check(base_model)
    assert (checked.lag, checked.regions) == (None, ())


def test_everything_given(base_model: BaseModel) -> None:
    regions = [
        pb.Region(prompt="a hat", adapters=[FOX], box=pb.Box(x=8, y=0, width=120, height=128), feather=16),
        pb.Region(prompt=" ", mask=b"png"),
    ]
    lag = pb.LagSampling(words=[" fox ", "teddy bear"], return_masks=True)
    checked = check(
        base_model, FakeEngine(max_batch=12), adapters=[FOX], lag=lag, regions=regions, shared_attention=True, count=2
    )
    assert checked.lag == LagRequest(("fox", "teddy bear"), True)
    assert checked.regions == (
        WantedRegion("a hat", (WantedAdapter("fox", "fox", 0, 1.0),), Box(8, 0, 120, 128), 16.0),
        WantedRegion("a fox", (), b"png", 0.0),
    )


def region(**fields: Any) -> pb.Region:
    return pb.Region(**{"box": WHOLE, **fields})


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"lag": pb.LagSampling()}, {"lag"}),
        ({"lag": pb.LagSampling(), "adapters": [pb.AdapterUse(adapter="fox", weight=0)]}, {"lag"}),
        ({"lag": pb.LagSampling(words=["a", "", "x" * 65]), "adapters": [FOX]}, {"lag.words[1]", "lag.words[2]"}),
        ({"lag": pb.LagSampling(words=["a"] * 17), "adapters": [FOX]}, {"lag.words"}),
        ({"shared_attention": True}, {"shared_attention"}),
        ({"shared_attention": True, "count": 5}, {"shared_attention"}),
        ({"shared_attention": True, "count": 9, "guidance_scale": 1}, {"shared_attention"}),
        ({"shared_attention": True, "count": 3, "regions": [region()]}, {"shared_attention"}),
        ({"regions": [region()] * 4}, {"regions"}),
        ({"regions": [region()] * 5}, {"regions"}),
        ({"regions": [pb.Region()]}, {"regions[0]"}),
        ({"regions": [region(), region(box=pb.Box(width=1))]}, {"regions[1].box"}),
        ({"regions": [region(box=pb.Box(x=1, width=128, height=128))]}, {"regions[0].box"}),
        ({"regions": [region(box=pb.Box(x=-1, width=2, height=2))]}, {"regions[0].box"}),
        ({"regions": [region(box=pb.Box(y=2**31 - 1, width=2**31 - 1, height=1))]}, {"regions[0].box"}),
        ({"regions": [pb.Region(mask=b"")]}, {"regions[0].mask"}),
        ({"regions": [pb.Region(mask=b"x" * (1024 * 1024 + 1))]}, {"regions[0].mask"}),
        ({"regions": [region(feather=-1)]}, {"regions[0].feather"}),
        ({"regions": [region(feather=math.nan)]}, {"regions[0].feather"}),
        ({"regions": [region(feather=257)]}, {"regions[0].feather"}),
        ({"regions": [region(prompt="x" * 2001)]}, {"regions[0].prompt"}),
        ({"regions": [region(adapters=[pb.AdapterUse(adapter="NO")])]}, {"regions[0].adapters[0].adapter"}),
        (
            {"regions": [region(), region(adapters=[FOX, pb.AdapterUse(adapter="b", weight=3)])], "steps": -1},
            {"regions[1].adapters[1].weight", "steps"},
        ),
    ],
)
def test_wrong_fields_are_named(base_model: BaseModel, fields: dict[str, Any], wrong: set[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(base_model, **fields)
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert set(found) == wrong
    assert all(any(word in text for word in ("allowed", "says where", "only")) for text in found.values())


def test_errors_state_what_would_fit(base_model: BaseModel) -> None:
    def told(**fields: Any) -> str:
        with pytest.raises(InvalidArgument) as caught:
            check(base_model, **fields)
        return caught.value.message

    assert "a count of at most 4" in told(shared_attention=True, count=5)
    assert "a count of at most 8" in told(shared_attention=True, count=9, guidance_scale=1)
    assert "a count of at most 1" in told(shared_attention=True, count=2, regions=[region()] * 2)
    assert "none can share" in told(shared_attention=True, count=2, regions=[region()] * 2)
    assert "at most 3" in told(regions=[region()] * 4)
    assert check(base_model, shared_attention=True, count=4).seeds
    assert len(check(base_model, regions=[region()] * 3).regions) == 3
    assert len(check(base_model, regions=[region()] * 4, guidance_scale=1).regions) == 4


def test_a_regions_adapter_of_another_tenant_is_not_found(base_model: BaseModel) -> None:
    theirs = pb.AdapterUse(adapter="tenants/rival/adapters/fox")
    with pytest.raises(NotFound):
        check(base_model, regions=[region(adapters=[theirs])])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lag": pb.LagSampling(), "adapters": [FOX]}, "lag:"),
        ({"shared_attention": True, "count": 2}, "shared_attention:"),
        ({"lag": pb.LagSampling(), "adapters": [FOX], "shared_attention": True, "count": 2}, "lag and shared_att"),
    ],
)
def test_an_engine_without_the_plan_refuses_at_once(base_model: BaseModel, fields: dict[str, Any], named: str) -> None:
    engine = FakeEngine()
    engine.plans = (Plan.DENSE, Plan.FACTORED)
    with pytest.raises(FailedPrecondition) as caught:
        check(base_model, engine, **fields)
    assert caught.value.reason is Reason.PLAN_UNAVAILABLE
    assert named in caught.value.message
    # Regions are plain batching, which every engine can do; and wrong fields come first.
    assert check(base_model, engine, regions=[region()]).regions
    with pytest.raises(InvalidArgument):
        check(base_model, engine, **fields, steps=-1)


def test_different_mixes_need_a_slot_each() -> None:
    bench = Bench()

    def request(*mixes: dict[str, float]) -> Any:
        own, *others = mixes
        return bench.request(adapters=own, regions=tuple(bench.region(mix) for mix in others))

    check_slots(request({"a": 1.0}, {"b": 1.0}, {"a": 1.0}, {}), FakeEngine(slots=3))
    check_slots(request({"a": 1.0}), FakeEngine(slots=1))
    with pytest.raises(InvalidArgument, match=r"3 different mixes.*at most 2") as caught:
        check_slots(request({"a": 1.0}, {"a": 0.5}, {"b": 1.0}), FakeEngine(slots=3))
    assert caught.value.violations[0].field == "regions"


@pytest.mark.parametrize(("rows", "regions"), [(1, 0), (2, 0), (4, 1), (8, 3), (10, 4), (64, 4)])
def test_most_regions(rows: int, regions: int) -> None:
    assert max_regions(FakeEngine(max_batch=rows)) == regions


def picture(mode: str, colour: Any, size: tuple[int, int] = (6, 4), form: str = "PNG") -> bytes:
    target = io.BytesIO()
    Image.new(mode, size, colour).save(target, form)
    return target.getvalue()


async def test_masks_become_plain_grey_pictures() -> None:
    box = Box(0, 0, 1, 1)
    half = Image.new("RGBA", (6, 4), (255, 255, 255, 255))
    half.paste((0, 0, 0, 0), (0, 0, 3, 4))
    target = io.BytesIO()
    half.save(target, "PNG")
    given: list[Area] = [
        picture("L", 200),
        box,
        target.getvalue(),
        picture("RGBA", (255, 255, 255, 255)),
        picture("RGB", (255, 255, 255), form="JPEG"),
    ]
    clean = await RegionPictures().sanitise(given)
    assert clean[1] == box
    pictures = [Image.open(io.BytesIO(area)) for area in clean if isinstance(area, bytes)]
    assert {(image.format, image.mode, image.size) for image in pictures} == {("PNG", "L", (6, 4))}
    assert [image.getextrema() for image in pictures] == [(200, 200), (0, 255), (255, 255), (255, 255)]
    assert await RegionPictures().sanitise([box]) == [box]


async def test_refused_masks_are_named_by_their_region() -> None:
    bomb = picture("L", 0, (5000, 5000))
    with pytest.raises(InvalidArgument) as caught:
        await RegionPictures().sanitise([Box(0, 0, 1, 1), b"GIF89a", picture("L", 1), bomb])
    assert [v.field for v in caught.value.violations] == ["regions[1].mask", "regions[3].mask"]
    assert caught.value.reason is Reason.PICTURE_INVALID
    assert "regions[1].mask" in caught.value.message
    assert "pictures" not in caught.value.message
