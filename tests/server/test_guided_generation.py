"""LAG, shared attention and regions end to end: over gRPC, on the embedded model and its default engine."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from embedded_adapters import random_lowrank
from PIL import Image
from whole_server import LiveServer, RpcStubs, live_server, refusal

from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import AdapterEngine, EngineOptions, build_engine
from hueshift.server.services import ServingParts
from hueshift.v1 import generation_pb2 as pb
from hueshift.v1 import model_pb2

# Levels of 255 by which a picture in company may differ from the same one alone (tests/server/test_generation.py).
TOLERANCE = 2
Picture = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def engine(base_model: BaseModel, cache_dir: Path) -> AdapterEngine:
    """The default engine of a CPU."""
    return build_engine(base_model, EngineOptions(cache_dir=cache_dir, kind="onnxruntime", slots=4, max_batch=8))


@pytest_asyncio.fixture
async def caller(base_model: BaseModel, engine: AdapterEngine, tmp_path: Path) -> AsyncIterator[RpcStubs]:
    """A tenant with two adapters: `sks`, which taught a word, and `ink`, which did not."""
    parts = ServingParts(base_model, engine, engine.rows, engine.factors, engine.norms)
    async with live_server(tmp_path, parts) as server:
        live: LiveServer = server
        stubs = await live.caller("acme")
        taught = replace(random_lowrank(base_model, engine.rows, 1), identifier="sks", class_noun="fox")
        await stubs.import_adapter("sks", write_adapter(taught))
        await stubs.import_adapter("ink", write_adapter(random_lowrank(base_model, engine.rows, 2)))
        yield stubs


async def pictures(stubs: RpcStubs, **fields: Any) -> list[pb.Image]:
    events = await stubs.generate(**{"steps": 3, "seeds": [5], "sampler": pb.SAMPLER_DDIM, **fields})
    return sorted((event.image for event in events if event.HasField("image")), key=lambda image: image.index)


def pixels(data: bytes, mode: str = "RGB") -> Picture:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode)).astype(np.int64)


def distance(one: pb.Image, other: pb.Image) -> int:
    return int(np.abs(pixels(one.data) - pixels(other.data)).max())


async def test_all_three_together_and_alone(caller: RpcStubs) -> None:
    model = (await caller.models.GetModel(model_pb2.GetModelRequest(), metadata=caller.metadata)).model
    assert (model.lag, model.shared_attention, model.max_regions) == (True, True, 3)
    use = pb.AdapterUse(adapter="sks")
    prompt = "a red sks fox, dancing"
    ink = pb.Region(prompt="a blue house", adapters=[pb.AdapterUse(adapter="ink")], box=pb.Box(width=64, height=128))
    asked: list[dict[str, Any]] = [
        {"prompt": prompt, "adapters": [use], "lag": pb.LagSampling(return_masks=True)},
        {"prompt": prompt, "count": 2, "shared_attention": True, "guidance_scale": 1},
        {"prompt": prompt, "regions": [ink]},
        {"prompt": prompt, "adapters": [use]},
    ]
    together = await asyncio.gather(*(pictures(caller, **fields) for fields in asked))
    confined, (first, second), pieced, unconfined = (*together,)
    for found, fields in zip(together, asked, strict=True):
        for mine, theirs in zip(found, await pictures(caller, **fields), strict=True):
            assert distance(mine, theirs) <= TOLERANCE
            assert mine.mask == theirs.mask or np.abs(pixels(mine.mask, "L") - pixels(theirs.mask, "L")).mean() < 2
    mask = pixels(confined[0].mask, "L")
    assert mask.shape == (128, 128)
    # Every block's mask passes half of its positions.
    assert 110 < mask.mean() < 145
    assert mask.std() > 10
    assert distance(confined[0], unconfined[0]) > TOLERANCE
    assert "full" in confined[0].plans
    plain = await pictures(caller, prompt=prompt, count=2, guidance_scale=1)
    assert distance(first, plain[0]) <= TOLERANCE
    assert distance(second, plain[1]) > TOLERANCE
    assert [applied.adapter for applied in pieced[0].regions[0].adapters] == ["tenants/acme/adapters/ink"]
    assert pieced[0].mask == b""


async def test_a_mask_picture_is_the_box_it_shows(caller: RpcStubs) -> None:
    shown = np.zeros((128, 128), np.uint8)
    shown[:, :64] = 255
    file = io.BytesIO()
    Image.fromarray(shown, "L").save(file, "PNG")
    use = [pb.AdapterUse(adapter="ink")]
    box = await pictures(caller, regions=[pb.Region(adapters=use, box=pb.Box(width=64, height=128))])
    mask = await pictures(caller, regions=[pb.Region(adapters=use, mask=file.getvalue())])
    plain = await pictures(caller)
    assert distance(box[0], mask[0]) <= TOLERANCE
    assert distance(box[0], plain[0]) > TOLERANCE


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lag": pb.LagSampling(), "adapters": [pb.AdapterUse(adapter="sks")]}, ["prompt", "prompt"]),
        ({"lag": pb.LagSampling(), "adapters": [pb.AdapterUse(adapter="ink")]}, ["lag.words"]),
        (
            {"lag": pb.LagSampling(words=["fox", "hat"]), "adapters": [pb.AdapterUse(adapter="ink")]},
            ["lag.words[0]", "lag.words[1]"],
        ),
        ({"regions": [pb.Region(mask=b"not a picture")]}, ["regions[0].mask"]),
        ({"shared_attention": True, "count": 5}, ["shared_attention"]),
    ],
)
async def test_errors_name_the_field(caller: RpcStubs, fields: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pictures(caller, prompt="a house", **fields)
    told = refusal(caught.value)
    assert (told.code, told.fields) == (grpc.StatusCode.INVALID_ARGUMENT, named)
