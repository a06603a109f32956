"""Adapters mixed by block, over gRPC on the real engine: a request's mix is the picture of the saved combination."""

import asyncio
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from embedded_adapters import random_lowrank, random_spectral
from PIL import Image
from whole_server import LiveServer, RpcStubs, live_server

from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import EngineOptions, build_engine
from hueshift.server.services import ServingParts
from hueshift.v1 import adapters_pb2 as adapters_pb
from hueshift.v1 import generation_pb2 as pb

# As everywhere: a batched product adds up in another order than a single one.
LEVELS, MEAN_LEVELS = 2, 0.05
DISTINCT_MEAN = 0.5
Pixels = npt.NDArray[np.int16]


@pytest.fixture(scope="module")
def parts(base_model: BaseModel, cache_dir: Path) -> ServingParts:
    """The default engine of a CPU over the embedded model."""
    engine = build_engine(base_model, EngineOptions(cache_dir=cache_dir, slots=9, max_batch=16))
    return ServingParts(base_model, engine, engine.rows, engine.factors, engine.norms)


@pytest_asyncio.fixture
async def caller(parts: ServingParts, tmp_path: Path) -> AsyncIterator[RpcStubs]:
    """A tenant with two spectral and two low-rank adapters."""
    async with live_server(tmp_path, parts, server={"default_deadline_seconds": 250}) as live:
        caller = await _owner(live, parts)
        yield caller


async def _owner(live: LiveServer, parts: ServingParts) -> RpcStubs:
    caller = await live.caller("acme")
    for seed, name in enumerate(("one", "two")):
        spectral = random_spectral(parts.base, parts.factors, seed)
        await caller.import_adapter(f"spectral-{name}", write_adapter(spectral))
        # Together they have more ranks than the engine serves on a layer, but not on any layer of a mix by block.
        lowrank = random_lowrank(parts.base, parts.rows, seed, rank=12)
        await caller.import_adapter(f"lowrank-{name}", write_adapter(lowrank))
    return caller


async def draw(caller: RpcStubs, *uses: pb.AdapterUse) -> pb.Image:
    request = pb.GenerateRequest(
        prompt="an emoji of a fox", adapters=uses, seeds=[3], steps=3, width=64, height=64, guidance_scale=3.0
    )
    stream = caller.generation.Generate(request, metadata=caller.metadata)
    (image,) = [event.image async for event in stream if event.HasField("image")]
    picture: pb.Image = image
    return picture


def pixels(image: pb.Image) -> Pixels:
    return np.asarray(Image.open(BytesIO(image.data)), dtype=np.int16)


def assert_same(one: pb.Image, other: pb.Image) -> None:
    error = np.abs(pixels(one) - pixels(other))
    assert error.max() <= LEVELS
    assert error.mean() <= MEAN_LEVELS


def use(adapter: str, weight: float = 1.0, **blocks: float) -> pb.AdapterUse:
    return pb.AdapterUse(adapter=adapter, weight=weight, block_weights=blocks)


async def test_mixes_by_block_equal_the_saved_combinations_in_one_batch(caller: RpcStubs) -> None:
    for kind in ("spectral", "lowrank"):
        refs = [adapters_pb.AdapterRef(adapter=f"{kind}-{name}") for name in ("one", "two")]
        await caller.adapters.CombineAdapters(
            adapters_pb.CombineAdaptersRequest(
                adapter_id=f"{kind}-mixed",
                block_mix=adapters_pb.AdapterBlockMix(structure=refs[0], appearance=refs[1]),
            ),
            metadata=caller.metadata,
        )
    asked = [
        (use("spectral-one", structure=1), use("spectral-two", appearance=1)),
        (use("spectral-mixed"),),
        (use("lowrank-one", structure=1), use("lowrank-two", appearance=1)),
        (use("lowrank-mixed"),),
        (use("spectral-one"),),
        (use("spectral-two"),),
        (),
        # Ends: every block, and none.
        (use("spectral-one", 2.0, structure=0.5, appearance=0.5),),
        (use("spectral-one", structure=0, appearance=0),),
    ]
    images = await asyncio.gather(*(draw(caller, *uses) for uses in asked))
    assert_same(images[0], images[1])
    assert_same(images[2], images[3])
    assert_same(images[7], images[4])
    assert_same(images[8], images[6])
    distinct = [pixels(images[n]) for n in (0, 2, 4, 5, 6)]
    for n, picture in enumerate(distinct):
        for other in distinct[:n]:
            assert np.abs(picture - other).mean() > DISTINCT_MEAN
    applied = images[0].adapters
    assert dict(applied[0].block_weights) == {"down_blocks.2": 1.0, "down_blocks.3": 1.0}
    assert dict(images[7].adapters[0].block_weights) == {}
    assert images[7].adapters[0].weight == 1.0
    text = Image.open(BytesIO(images[0].data)).info["XML:com.adobe.xmp"]
    assert f"{applied[0].content_hash}*1[down_blocks.2=1,down_blocks.3=1]" in text
