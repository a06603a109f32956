"""Adapters with whole deltas end to end: imported over gRPC, drawn with beside others, refused where no engine can."""

import asyncio
import io
from pathlib import Path
from typing import Literal

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch
from embedded_adapters import random_spectral
from PIL import Image
from whole_server import live_server, refusal

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import AdapterEngine, EngineOptions, build_engine
from hueshift.engines.text_side import is_text_side
from hueshift.server.services import ServingParts
from hueshift.v1 import adapters_pb2, model_pb2

PROMPT = "a fluent 3d emoji of a red apple"


def pixels(data: bytes) -> npt.NDArray[np.int64]:
    """Levels of a picture."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def dense_adapter(base: BaseModel, scale: float) -> Adapter:
    """Deltas of every convolution that no low-rank branch can serve, and of one linear layer."""
    layout, deltas = base.layout, dict[str, torch.Tensor]()
    generator = torch.Generator().manual_seed(7)
    for layer in layout.matrices:
        if not is_text_side(layer.name) and (not layer.is_pointwise or layer.name.endswith("attn1.to_q")):
            weight = base.unet.get_parameter(f"{layer.name}.weight").detach()
            noise = torch.randn(layer.rows, layer.cols, generator=generator)
            deltas[layer.name] = (scale * weight.std() * noise).half()
    return Adapter(AdapterKind.DENSE, layout.base_hash, "dreambooth", dense=deltas)


def parts_of(base: BaseModel, cache: Path, kind: Literal["torch", "onnxruntime"]) -> ServingParts:
    """An engine of a CPU."""
    engine: AdapterEngine = build_engine(base, EngineOptions(cache_dir=cache, kind=kind, slots=4, max_batch=4))
    return ServingParts(base, engine, engine.rows, engine.factors, engine.norms)


async def test_they_are_drawn_with_beside_others_by_the_torch_engine(
    base_model: BaseModel, cache_dir: Path, tmp_path: Path
) -> None:
    parts = parts_of(base_model, cache_dir, "torch")
    async with live_server(tmp_path, parts) as server:
        stubs = await server.caller("acme")
        adapter = await stubs.import_adapter("whole", write_adapter(dense_adapter(base_model, 0.2)))
        assert adapter.kind == adapters_pb2.ADAPTER_KIND_DENSE
        await stubs.import_adapter("odd", write_adapter(random_spectral(base_model, parts.factors, 1)))
        asked = {"prompt": PROMPT, "steps": 3, "seeds": [5], "guidance_scale": 2.0}
        whole = [{"adapter": adapter.name, "weight": 1.0}]
        odd = [{"adapter": "tenants/acme/adapters/odd", "weight": 0.5}]
        plain = (await stubs.images(**asked))[0]
        together = await asyncio.gather(
            stubs.images(**asked, adapters=whole),
            stubs.images(**asked, adapters=odd),
            stubs.images(**asked),
        )
        alone = [(await stubs.images(**asked, adapters=adapters))[0] for adapters in (whole, odd)]
        for (mixed,), one in zip(together, [*alone, plain], strict=True):
            assert np.abs(pixels(mixed) - pixels(one)).max() <= 2
        # It changes the picture, by half its weight less.
        half = (await stubs.images(**asked, adapters=[{"adapter": adapter.name, "weight": 0.5}]))[0]
        base, full = pixels(plain), pixels(alone[0])
        assert np.abs(full - base).mean() > 1.5 * np.abs(pixels(half) - base).mean() > 1
        events = await stubs.generate(**asked, adapters=whole)
        assert next(event.image for event in events if event.HasField("image")).plans == ["merged"]
        request = model_pb2.GetModelRequest(name="models/emoji-128")
        model = (await stubs.models.GetModel(request, metadata=stubs.metadata)).model
        assert model.capacity.dense_slots == 3


async def test_onnx_runtime_refuses_them_and_says_what_to_do(
    base_model: BaseModel, cache_dir: Path, tmp_path: Path
) -> None:
    async with live_server(tmp_path, parts_of(base_model, cache_dir, "onnxruntime")) as server:
        stubs = await server.caller("acme")
        adapter = await stubs.import_adapter("whole", write_adapter(dense_adapter(base_model, 0.2)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.images(prompt=PROMPT, adapters=[{"adapter": adapter.name, "weight": 1.0}])
        told = refusal(caught.value)
        assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PLAN_UNAVAILABLE")
        assert "bring it to a low rank" in told.message
