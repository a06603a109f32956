"""GenerateRequest: what is allowed, what the defaults are, and that every wrong field is named at once."""

import math
from typing import Any

import pytest
from fake_engine import FakeEngine

from hueshift.adapters.blocks import BlockWeights
from hueshift.adapters.errors import InvalidArgument, NotFound, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.samplers import SamplerKind
from hueshift.server.rpc.adapter_uses import WantedAdapter
from hueshift.server.rpc.generation_checks import DEFAULT_SAMPLER, CheckedRequest, check_request
from hueshift.server.settings import LimitSettings
from hueshift.v1 import generation_pb2 as pb


def check(base: BaseModel, engine: FakeEngine | None = None, **fields: Any) -> CheckedRequest:
    request = pb.GenerateRequest(**{"prompt": "a fox", **fields})
    return check_request(request, "acme", LimitSettings(), base, engine or FakeEngine(max_batch=16))


def wrong_fields(base: BaseModel, **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        check(base, **fields)
    assert caught.value.reason is Reason.INVALID_FIELD
    return {violation.field: violation.description for violation in caught.value.violations}


def test_defaults(base_model: BaseModel) -> None:
    checked = check(base_model)
    assert checked.adapters == ()
    assert len(checked.seeds) == 1
    assert (checked.steps, checked.guidance_scale) == (20, 5.0)
    assert (checked.sampler, checked.eta) == (DEFAULT_SAMPLER, 0.0)
    assert (checked.width, checked.height) == (base_model.pixels, base_model.pixels)
    assert (checked.format, checked.preview_interval, checked.priority) == (PictureFormat.PNG, 0, 0)


def test_everything_given(base_model: BaseModel) -> None:
    checked = check(
        base_model,
        adapters=[
            pb.AdapterUse(adapter="fox", weight=0.5),
            pb.AdapterUse(adapter="tenants/acme/adapters/ink", revision=3),
        ],
        count=3,
        seeds=[1, 2, 3],
        steps=7,
        guidance_scale=1,
        sampler=pb.SAMPLER_DDIM,
        eta=0.5,
        width=base_model.size_multiple * 2,
        height=base_model.size_multiple * 3,
        format=pb.IMAGE_FORMAT_WEBP,
        preview_interval=2,
        priority=pb.PRIORITY_HIGH,
    )
    assert checked.adapters == (
        WantedAdapter("fox", "fox", 0, 0.5),
        WantedAdapter("ink", "tenants/acme/adapters/ink", 3, 1.0),
    )
    assert checked.seeds == (1, 2, 3)
    assert (checked.steps, checked.guidance_scale, checked.eta) == (7, 1.0, 0.5)
    assert (checked.sampler, checked.format, checked.priority) == (SamplerKind.DDIM, PictureFormat.WEBP, 1)
    assert (checked.width, checked.height) == (base_model.size_multiple * 2, base_model.size_multiple * 3)


def test_one_seed_counts_up_and_wraps(base_model: BaseModel) -> None:
    assert check(base_model, count=3, seeds=[2**64 - 2]).seeds == (2**64 - 2, 2**64 - 1, 0)


def test_random_seeds_differ(base_model: BaseModel) -> None:
    assert len({seed for _ in range(4) for seed in check(base_model, count=4).seeds}) == 16


def test_a_weight_of_zero_is_not_absent(base_model: BaseModel) -> None:
    assert check(base_model, adapters=[pb.AdapterUse(adapter="fox", weight=0)]).adapters[0].weight == 0.0


def test_weights_by_block_are_resolved_for_the_base(base_model: BaseModel) -> None:
    def use(weight: float, **blocks: float) -> WantedAdapter:
        given = pb.AdapterUse(adapter="fox", weight=weight, block_weights=blocks)
        return check(base_model, adapters=[given]).adapters[0]

    adapter = use(0.5, structure=-2)
    assert (adapter.weight, adapter.blocks) == (
        0.5,
        BlockWeights((("down_blocks.2", -2.0), ("down_blocks.3", -2.0))),
    )
    assert adapter.strength == BlockWeights((("down_blocks.2", -1.0), ("down_blocks.3", -1.0)))
    assert use(0.5, structure=1, appearance=1).strength == 0.5
    assert use(0.5, structure=0, mid_block=0).strength == 0


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"prompt": ""}, {"prompt"}),
        ({"prompt": " \n"}, {"prompt"}),
        ({"prompt": "x" * 2001}, {"prompt"}),
        ({"negative_prompt": "x" * 2001}, {"negative_prompt"}),
        ({"count": -1}, {"count"}),
        ({"count": 17}, {"count"}),
        ({"count": 3, "seeds": [1, 2]}, {"seeds"}),
        ({"seeds": [1, 2]}, {"seeds"}),
        ({"steps": -1}, {"steps"}),
        ({"steps": 151}, {"steps"}),
        ({"guidance_scale": 0.5}, {"guidance_scale"}),
        ({"guidance_scale": 31}, {"guidance_scale"}),
        ({"guidance_scale": math.nan}, {"guidance_scale"}),
        ({"sampler": 99}, {"sampler"}),
        ({"sampler": pb.SAMPLER_DDIM, "eta": 1.5}, {"eta"}),
        ({"sampler": pb.SAMPLER_DDIM, "eta": -math.inf}, {"eta"}),
        ({"sampler": pb.SAMPLER_EULER, "eta": 0.5}, {"eta"}),
        ({"width": 100}, {"width"}),
        ({"height": -64}, {"height"}),
        ({"width": 1 << 20, "height": 1 << 20}, {"width", "height"}),
        ({"format": 42}, {"format"}),
        ({"preview_interval": -1}, {"preview_interval"}),
        ({"priority": -7}, {"priority"}),
        ({"adapters": [pb.AdapterUse(adapter="")]}, {"adapters[0].adapter"}),
        ({"adapters": [pb.AdapterUse(adapter="a/b")]}, {"adapters[0].adapter"}),
        ({"adapters": [pb.AdapterUse(adapter="a", weight=2.5)]}, {"adapters[0].weight"}),
        ({"adapters": [pb.AdapterUse(adapter="a", weight=math.nan)]}, {"adapters[0].weight"}),
        ({"adapters": [pb.AdapterUse(adapter="a", revision=-1)]}, {"adapters[0].revision"}),
        (
            {"adapters": [pb.AdapterUse(adapter="a", block_weights={"mid": 1, "structure": 1, "layout": 1})]},
            {"adapters[0].block_weights['mid']", "adapters[0].block_weights['layout']"},
        ),
        (
            {"adapters": [pb.AdapterUse(adapter="a", block_weights={"mid_block": -2.5, "up_blocks.0": math.inf})]},
            {"adapters[0].block_weights['mid_block']", "adapters[0].block_weights['up_blocks.0']"},
        ),
        (
            {"adapters": [pb.AdapterUse(adapter="a", block_weights={f"b{i}": 1 for i in range(65)})]},
            {"adapters[0].block_weights"},
        ),
        (
            {"adapters": [pb.AdapterUse(adapter="a"), pb.AdapterUse(adapter="tenants/acme/adapters/a")]},
            {"adapters[1].adapter"},
        ),
        ({"adapters": [pb.AdapterUse(adapter=f"a{i}") for i in range(5)]}, {"adapters"}),
    ],
)
def test_wrong_fields_are_named(base_model: BaseModel, fields: dict[str, Any], wrong: set[str]) -> None:
    found = wrong_fields(base_model, **fields)
    assert set(found) == wrong
    assert all("allowed" in text or "only" in text or "empty" in text or "twice" in text for text in found.values())


def test_all_wrong_fields_are_named_at_once(base_model: BaseModel) -> None:
    found = wrong_fields(
        base_model,
        prompt="",
        count=99,
        steps=-4,
        sampler=9,
        width=7,
        adapters=[pb.AdapterUse(adapter="ok", weight=3), pb.AdapterUse(adapter="NOT")],
    )
    assert set(found) == {
        "prompt",
        "count",
        "steps",
        "sampler",
        "width",
        "adapters[0].weight",
        "adapters[1].adapter",
    }
    assert "SAMPLER_DPMPP_2M" in found["sampler"]


def test_another_tenants_adapter_is_not_found_unless_fields_are_wrong(base_model: BaseModel) -> None:
    theirs = [pb.AdapterUse(adapter="tenants/rival/adapters/fox")]
    with pytest.raises(NotFound) as caught:
        check(base_model, adapters=theirs)
    assert caught.value.reason is Reason.ADAPTER_NOT_FOUND
    assert set(wrong_fields(base_model, adapters=theirs, steps=-1)) == {"steps"}


def test_a_request_of_a_million_blocks_is_refused_in_one_sentence(base_model: BaseModel) -> None:
    blocks = {f"block-{number}": math.nan for number in range(65)}
    with pytest.raises(InvalidArgument) as caught:
        check(base_model, adapters=[pb.AdapterUse(adapter="fox", block_weights=blocks)])
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("adapters[0].block_weights", "65 blocks given; allowed: at most 64")
    ]
