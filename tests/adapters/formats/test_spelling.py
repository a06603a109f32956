"""Foreign names of layers, against the names that diffusers' own converter of checkpoints knows."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from foreign_unet import BASE_HASH, WIDTH, foreign_unet

from hueshift.adapters.formats.spelling import LayerNames, Part, split_part
from hueshift.adapters.layout import BaseLayout, MatrixLayer, NormLayer
from hueshift.engines.base_model import read_layout

SD15: dict[str, Any] = {"cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}

SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}


@pytest.mark.parametrize("config", [SD15, SDXL, {"layers_per_block": 1, "block_out_channels": (32, 32, 64, 64)}])
def test_names_of_the_first_code_are_those_of_diffusers(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**config)
    layout = read_layout(unet, BASE_HASH, WIDTH)
    names = LayerNames(layout)
    layers = [layer.name for layer in layout.matrices] + [layer.name for layer in layout.norms]
    spelled = _first_code_names(names, layers)
    assert spelled.keys() == set(layers)
    checkpoint = {f"model.diffusion_model.{name}.weight": layer for layer, name in spelled.items()}
    checkpoint |= {f"model.diffusion_model.{name}.bias": layer for layer, name in spelled.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    wrong = {key: layer for key, layer in converted.items() if key.rpartition(".")[0] != layer}
    assert not wrong
    for layer, name in spelled.items():
        assert names.find(name.replace(".", "_")) == layer
        assert names.find(layer.replace(".", "_")) == names.find(layer) == layer


def _first_code_names(names: LayerNames, layers: list[str]) -> dict[str, str]:
    beginnings = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    return {layer: name for name, layer in names._layer_of.items() if layer and name.startswith(beginnings)}


def test_prefixes_tell_the_network() -> None:
    expected = {
        "unet.a.b": (Part.UNET, "a.b"),
        "base_model.model.a.b": (Part.UNET, "a.b"),
        "base_model.model.unet.a.b": (Part.UNET, "a.b"),
        "model.diffusion_model.out.0": (Part.UNET, "out.0"),
        "lora_unet_a_b": (Part.UNET, "a_b"),
        "lycoris_a_b": (Part.UNET, "a_b"),
        "a.b": (Part.UNET, "a.b"),
        "lora_te_text_model_x": (Part.TEXT, "text_model_x"),
        "lora_te2_x": (Part.TEXT, "x"),
        "base_model.model.text_model.x": (Part.TEXT, "x"),
        "text_encoder.text_model.x": (Part.TEXT, "text_model.x"),
        "cond_stage_model.x": (Part.TEXT, "x"),
        "first_stage_model.x": (Part.OTHER, "first_stage_model.x"),
    }
    assert {name: split_part(name) for name in expected} == expected


def test_a_spelling_of_two_layers_means_neither() -> None:
    layout = BaseLayout("0" * 64, (MatrixLayer("a.b_c", (2, 2)), MatrixLayer("a_b.c", (2, 2))), (NormLayer("n", 2),), 4)
    names = LayerNames(layout)
    assert (names.find("a_b_c"), names.find("a.b_c"), names.find("n")) == (None, "a.b_c", "n")


def test_the_projection_after_attention_has_two_names() -> None:
    names = LayerNames(read_layout(foreign_unet(), BASE_HASH, WIDTH))
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert names.find(layer.removesuffix(".0")) == names.find(layer.replace(".", "_")) == layer
    assert names.find("no.such.layer") is None
