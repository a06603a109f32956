"""img2img and edits by inversion end to end: over gRPC, on the embedded model and its default engine."""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from embedded_adapters import random_spectral
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
PROMPT = "a fluent 3d emoji of a red apple"
Pixels = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def engine(base_model: BaseModel, cache_dir: Path) -> AdapterEngine:
    """The default engine of a CPU."""
    return build_engine(base_model, EngineOptions(cache_dir=cache_dir, kind="onnxruntime", slots=4, max_batch=8))


@pytest_asyncio.fixture
async def caller(base_model: BaseModel, engine: AdapterEngine, tmp_path: Path) -> AsyncIterator[RpcStubs]:
    parts = ServingParts(base_model, engine, engine.rows, engine.factors, engine.norms)
    async with live_server(tmp_path, parts) as server:
        live: LiveServer = server
        stubs = await live.caller("acme")
        await stubs.import_adapter("odd", write_adapter(random_spectral(base_model, engine.factors, 1)))
        yield stubs


async def events_of(stubs: RpcStubs, **fields: Any) -> tuple[list[pb.Image], pb.Finished]:
    events = await stubs.generate(**{"prompt": PROMPT, "steps": 6, "seeds": [5], **fields})
    images = sorted((event.image for event in events if event.HasField("image")), key=lambda image: image.index)
    return images, events[-1].finished


def pixels(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def distance(one: bytes, other: bytes) -> float:
    return float(np.abs(pixels(one) - pixels(other)).mean())


def levels_apart(one: pb.Image, other: pb.Image) -> int:
    return int(np.abs(pixels(one.data) - pixels(other.data)).max())


async def test_a_picture_is_changed_and_edited_beside_others(caller: RpcStubs) -> None:
    model = (await caller.models.GetModel(model_pb2.GetModelRequest(), metadata=caller.metadata)).model
    assert (model.max_start_bytes, model.default_inversion_steps) == (4 * 1024 * 1024, 50)
    assert model.default_strength == pytest.approx(0.8)
    (drawn,), _ = await events_of(caller, steps=12, sampler=pb.SAMPLER_DPMPP_2M)
    source = drawn.data
    edit = {
        "prompt": PROMPT.replace("red", "green"),
        "adapters": [pb.AdapterUse(adapter="odd", weight=0.2)],
        "count": 2,
        "seeds": [5, 6],
        "eta": 0.5,
        "picture": pb.StartPicture(data=source, inversion=pb.Inversion(steps=8, report_error=True)),
    }
    asked: list[dict[str, Any]] = [
        {"picture": pb.StartPicture(data=source, strength=0.3)},
        {"picture": pb.StartPicture(data=source, strength=0.9), "seeds": [77]},
        edit,
        {"steps": 3},
    ]
    together = await asyncio.gather(*(events_of(caller, **fields) for fields in asked))
    for (found, finished), fields in list(zip(together, asked, strict=True))[1:3]:
        alone, alone_finished = await events_of(caller, **fields)
        for mine, theirs in zip(found, alone, strict=True):
            assert levels_apart(mine, theirs) <= TOLERANCE
        assert finished.HasField("inversion_error") == (fields is edit)
        assert finished.inversion_error == pytest.approx(alone_finished.inversion_error, rel=1e-2)
    (near,), (far,), (first, second) = (images for images, _ in together[:3])
    assert distance(near.data, source) < distance(far.data, source)
    assert 0 < together[2][1].inversion_error < 1
    # The picture is encoded once for both; the second one starts from the first one's inversion.
    assert first.timings.inversion.ToNanoseconds() > 0
    assert second.timings.inversion.ToNanoseconds() == 0
    assert first.timings.picture.ToNanoseconds() > 0
    assert set(first.plans) == {"factored"}
    assert first.data != second.data


async def test_inversion_without_guidance_gives_the_picture_back(caller: RpcStubs) -> None:
    (drawn,), _ = await events_of(caller, steps=12)
    inversion = pb.Inversion(steps=15, report_error=True)
    start = pb.StartPicture(data=drawn.data, inversion=inversion)
    (kept,), finished = await events_of(caller, steps=15, guidance_scale=1, picture=start)
    fresh = pb.StartPicture(data=drawn.data, strength=1)
    (lost,), _ = await events_of(caller, steps=15, guidance_scale=1, picture=fresh, seeds=[77])
    print(f"error {finished.inversion_error:.3f}, levels {distance(kept.data, drawn.data):.1f}")
    assert finished.inversion_error < 0.2
    assert distance(kept.data, drawn.data) < 8
    assert distance(kept.data, drawn.data) < distance(lost.data, drawn.data) / 2
    # The file names what it was made from, by the hash of the caller's own file.
    origin = hashlib.sha256(drawn.data).hexdigest()
    assert f"{origin} strength=1 inversion=15".encode() in kept.data
    assert f"{origin} strength=1<".encode() in lost.data


@pytest.mark.parametrize("data", [b"no picture", b"GIF89a" + bytes(40)])
async def test_a_file_that_is_no_picture_is_refused_by_name(caller: RpcStubs, data: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events_of(caller, picture=pb.StartPicture(data=data))
    told = refusal(caught.value)
    assert (told.code, told.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PICTURE_INVALID")
    assert told.fields == ["picture.data"]
