"""A whole SDXL model, as diffusers saves it, of a few thousand weights drawn at random."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny_unet import TinyParts
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import decompose

TOKENS = 24
WIDTHS = (16, 24)
"""Of the hidden states of the two text encoders."""
POOLED = 20
TIME_DIM = 8
SDXL_BLOCKS: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_DIM,
    "projection_class_embeddings_input_dim": POOLED + 6 * TIME_DIM,
    "cross_attention_dim": sum(WIDTHS),
}
"""SDXL's own blocks; only widths are smaller."""
# The real one has 5, 10 and 20 heads of width 64.
TINY: dict[str, Any] = {
    **SDXL_BLOCKS,
    "sample_size": 8,
    "block_out_channels": [16, 16, 32],
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 1, 2],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# SDXL's scheduler: leading spacing, one step off.
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789<>.,!"


def save_tiny_sdxl(folder: Path, unet: dict[str, Any] | None = None, *, seed: int = 5) -> Path:
    """Write the model to `folder` and return it; equal seeds give equal weights. `unet` changes the UNet's settings."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers = [_tokenizer(folder / "vocabulary", pad) for pad in ("<|endoftext|>", "!")]
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[8, 8],
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.13025,
            force_upcast=True,
        ),
        text_encoder=CLIPTextModel(_text(WIDTHS[0], tokenizers[0])),
        text_encoder_2=CLIPTextModelWithProjection(_text(WIDTHS[1], tokenizers[1])),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=_shaken(UNet2DConditionModel(**{**TINY, **(unet or {})})),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sdxl_parts(
    base: BaseModel, targets: tuple[str, ...] = ("proj_out", "to_q"), *, text_side: bool = False
) -> TinyParts:
    """What engines are made of, with small ranks."""
    norms = read_norms(base.layout, lambda layer: base.unet.get_parameter(f"{layer}.weight"))
    return TinyParts(base, decompose(base), RowLayout(base.layout, targets, 4, text_side), norms)


def _shaken(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Norms of weights other than 1, so that forgetting one shows."""
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.data.add_(0.2 * torch.randn_like(module.weight))
            module.bias.data.add_(0.2 * torch.randn_like(module.bias))
    return unet


def _text(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=POOLED,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """A tokenizer of letters, and of the words that tests learn."""
    folder.mkdir(exist_ok=True)
    merges = [("s", "k"), ("sk", "s</w>"), ("f", "o"), ("fo", "x</w>")]
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=TOKENS)
