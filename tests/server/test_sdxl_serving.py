"""A whole SDXL model, as diffusers saves it, over gRPC: adapters of several kinds and forms, in one batch and alone."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import safetensors.torch
import torch
from PIL import Image
from text_side_adapters import stage_tokens
from tiny_sdxl import WIDTHS, save_tiny_sdxl
from whole_server import RpcStubs, live_server, refusal

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.build import AdapterEngine, EngineOptions, build_engine
from hueshift.server.services import ServingParts
from hueshift.v1 import adapters_pb2, finetune_pb2, model_pb2
from hueshift.v1 import generation_pb2 as pb


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base_model(save_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl"))


@pytest.fixture(scope="module")
def engine(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> AdapterEngine:
    """The default engine of a CPU; its graphs were compared with torch."""
    options = EngineOptions(
        cache_dir=tmp_path_factory.mktemp("cache"), kind="onnxruntime", threads=1, slots=6, max_batch=10
    )
    return build_engine(base, options)


def kohya_lora(base: BaseModel) -> bytes:
    """A LoRA as trainers of SDXL write it: first-code names with underscores, text encoders included."""
    draw = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in {
        "lora_unet_input_blocks_3_1_proj_out": "down_blocks.1.attentions.0.proj_out",
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k": (
            "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"
        ),
        "lora_unet_label_emb_0_0": "add_embedding.linear_1",
    }.items():
        found = base.layout.matrix(layer)
        assert found is not None
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, found.cols, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(found.rows, 2, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    for tower, width in zip(("lora_te1", "lora_te2"), WIDTHS, strict=True):
        layer = f"{tower}_text_model_encoder_layers_0_self_attn_q_proj"
        tensors[f"{layer}.lora_down.weight"] = torch.randn(2, width, generator=draw)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(width, 2, generator=draw)
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    return safetensors.torch.save(tensors)


def spectral(base: BaseModel, engine: AdapterEngine) -> bytes:
    draw = torch.Generator().manual_seed(4)
    shifts = {
        layer.name: 0.3 * engine.factors.sigma[layer.name] * torch.randn(layer.rank, generator=draw)
        for layer in base.layout.matrices
    }
    return write_adapter(Adapter(AdapterKind.SPECTRAL, base.base_hash, "svdiff", spectral=shifts))


@pytest_asyncio.fixture
async def caller(base: BaseModel, engine: AdapterEngine, tmp_path: Path) -> AsyncIterator[RpcStubs]:
    parts = ServingParts(base, engine, engine.rows, engine.factors, engine.norms)
    async with live_server(tmp_path, parts) as server:
        stubs = await server.caller("acme")
        draw = torch.Generator().manual_seed(5)
        word = {
            name: 0.3 * torch.randn(2, width, generator=draw)
            for name, width in zip(("clip_l", "clip_g"), WIDTHS, strict=True)
        }
        await stubs.import_adapter("spectral", spectral(base, engine))
        await stubs.import_adapter("lora", kohya_lora(base))
        await import_as(stubs, "word", safetensors.torch.save(word), word="<art>")
        await stubs.import_adapter("stages", write_adapter(stage_tokens(base.layout)))
        yield stubs


async def import_as(stubs: RpcStubs, adapter_id: str, data: bytes, **fields: Any) -> None:
    spec = adapters_pb2.ImportAdapterSpec(adapter_id=adapter_id, size_bytes=len(data), **fields)
    messages = [adapters_pb2.ImportAdapterRequest(spec=spec), adapters_pb2.ImportAdapterRequest(chunk=data)]
    await stubs.adapters.ImportAdapter(iter(messages), metadata=stubs.metadata)


def asked(adapter: str = "", prompt: str = "a fox", **fields: Any) -> dict[str, Any]:
    uses = [pb.AdapterUse(adapter=adapter)] if adapter else []
    return {"prompt": prompt, "adapters": uses, "seeds": [7], "steps": 2, "guidance_scale": 4.0, **fields}


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


async def test_pictures_of_all_adapters_in_one_batch_and_alone(caller: RpcStubs) -> None:
    requests = [
        asked(),
        asked("spectral"),
        asked("lora"),
        asked("word", "a <art> fox"),
        asked("stages", "a <stages> fox"),
    ]
    together = [images[0] for images in await asyncio.gather(*(caller.images(**request) for request in requests))]
    for request, picture in zip(requests, together, strict=True):
        alone = (await caller.images(**request))[0]
        assert np.abs(pixels(alone) - pixels(picture)).max() <= 2
    plain = pixels(together[0])
    assert plain.shape == (16, 16, 3)
    for picture in together[1:]:
        assert np.abs(pixels(picture) - plain).max() > 4, "the adapter must show"


async def test_size_is_a_condition(caller: RpcStubs, engine: AdapterEngine) -> None:
    """The same seed and prompt at two sizes: both are drawn, whatever is native."""
    for width, height in ((24, 16), (32, 32)):
        image = (await caller.images(**asked(width=width, height=height)))[0]
        assert pixels(image).shape == (height, width, 3)


async def test_model_says_its_architecture(caller: RpcStubs) -> None:
    model = (await caller.models.GetModel(model_pb2.GetModelRequest(), metadata=caller.metadata)).model
    assert (model.architecture, model.width, model.size_multiple) == ("stable-diffusion-xl", 16, 8)


async def test_fine_tuning_is_taken_but_for_words_by_layer(caller: RpcStubs) -> None:
    async def ask(**fields: Any) -> None:
        pictures = [finetune_pb2.PictureSpec(size_bytes=10, caption="a sks")]
        spec = finetune_pb2.FineTuneSpec(identifier="sks", pictures=pictures, validate_only=True, **fields)
        await caller.finetunes.CreateFineTune(
            iter([finetune_pb2.CreateFineTuneRequest(spec=spec)]), metadata=caller.metadata
        )

    for method in finetune_pb2.FineTuneMethod.values():
        if method != finetune_pb2.FINE_TUNE_METHOD_UNSPECIFIED:
            await ask(method=method)
    await ask(settings=finetune_pb2.FineTuneSettings(train_text_encoder=True))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(
            method=finetune_pb2.FINE_TUNE_METHOD_TEXTUAL_INVERSION,
            settings=finetune_pb2.FineTuneSettings(per_layer=True),
        )
    told = refusal(caught.value)
    assert (told.code, told.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["settings.per_layer"])
