"""Write the sizes of docs/adapters.md from the layers of Stable Diffusion 1.5, so that nobody types them by hand.

`python -P docs/adapter_sizes.py` rewrites what stands between `<!-- size: NAME -->` and `<!-- end -->`; a test
compares.
Sizes are those of the values; a file's header adds up to 0.1 MB.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.base_model import read_layout
from hueshift.training.defaults import LORA_TARGETS
from hueshift.training.methods.residuals import RESIDUAL_TARGET, residual_rank

PAGE = Path(__file__).resolve().parent / "adapters.md"
WIDTH = 768
FP16, FP32 = 2, 4
# What NeTI's program makes: 1024 frequencies of two inputs, two hidden layers of 128, an output and a bypass.
_NETI_FREQUENCIES, _NETI_HIDDEN = 1024, 128
_PROSPECT_STAGES = 10


def sd15_layout() -> BaseLayout:
    """Layers of Stable Diffusion 1.5's UNet and text encoder, from published configurations, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=WIDTH, attention_head_dim=8)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=12))
    return read_layout(unet, "0" * 64, WIDTH, (), (encoder,))


def lowrank_values(layers: Sequence[MatrixLayer], rank: int) -> int:
    """Values of A and B of one rank on layers, at most their own."""
    return sum(min(rank, layer.rank) * (layer.rows + layer.cols) for layer in layers)


def ending(layout: BaseLayout, *endings: str) -> list[MatrixLayer]:
    """Layers by the ends of their names."""
    return [layer for layer in layout.matrices if layer.name.endswith(tuple(f".{end}" for end in endings))]


def keys_and_values(layout: BaseLayout) -> list[MatrixLayer]:
    """to_k and to_v of every cross-attention."""
    return ending(layout, "attn2.to_k", "attn2.to_v")


def _residuals(layout: BaseLayout) -> int:
    layers = ending(layout, RESIDUAL_TARGET)
    return sum(residual_rank(layer.rows, layer.cols) * (layer.rows + layer.cols) for layer in layers)


def _norms(layout: BaseLayout) -> int:
    return sum(norm.size for norm in layout.norms)


def _spectral(layout: BaseLayout) -> int:
    return sum(layer.rank for layer in layout.matrices)


def _encoder(layout: BaseLayout) -> int:
    return sum(layer.rank for layer in layout.encoder_matrices) + sum(norm.size for norm in layout.encoder_norms)


def _encoder_attention(layout: BaseLayout) -> list[MatrixLayer]:
    return [layer for layer in layout.encoder_matrices if ".self_attn." in layer.name]


def _neti() -> int:
    first = 2 * _NETI_FREQUENCIES * _NETI_HIDDEN + 3 * _NETI_HIDDEN
    second = _NETI_HIDDEN**2 + 3 * _NETI_HIDDEN
    return 2 * _NETI_FREQUENCIES + first + second + (_NETI_HIDDEN + 1) * 2 * WIDTH


BYTES: Mapping[str, Callable[[BaseLayout], int]] = {
    "spectral": lambda layout: FP32 * layout.spectral_size,
    "spectral-mkshing": lambda layout: FP32 * (_spectral(layout) + len(layout.norms)),
    "spectral-text": lambda layout: FP32 * _encoder(layout),
    "lora-text-4": lambda layout: FP16 * lowrank_values(_encoder_attention(layout), 4),
    "residuals": lambda layout: FP16 * _residuals(layout),
    "lora-4": lambda layout: FP16 * lowrank_values(ending(layout, *LORA_TARGETS), 4),
    "locon-8": lambda layout: FP16 * lowrank_values(layout.matrices, 8),
    "attention-16": lambda layout: FP32 * lowrank_values(ending(layout, *LORA_TARGETS), 16),
    "norms": lambda layout: FP16 * _norms(layout),
    "kv": lambda layout: FP32 * sum(layer.rows * layer.cols for layer in keys_and_values(layout)),
    "kv-16": lambda layout: FP32 * lowrank_values(keys_and_values(layout), 16),
    "gated": lambda layout: FP32 * (2 * WIDTH + sum(layer.rows for layer in keys_and_values(layout)) + WIDTH),
    "whole": lambda layout: FP16 * sum(layer.rows * layer.cols for layer in layout.matrices),
    "every-16": lambda layout: FP32 * lowrank_values(layout.matrices, 16),
    "vector": lambda layout: FP16 * WIDTH,
    "layers": lambda layout: FP32 * WIDTH * len(layout.cross_attentions),
    "stages": lambda layout: FP32 * WIDTH * _PROSPECT_STAGES,
    "mapper": lambda layout: FP32 * _neti(),
}


def show(count: int) -> str:
    """Bytes to two digits, in kB below 100 kB, in GB from 1 GB, else in MB; whole from 10 of them."""
    unit, amount = ("MB", count / 1e6) if count >= 100_000 else ("kB", count / 1e3)
    if count >= 1e9:
        unit, amount = "GB", count / 1e9
    digits = 0 if amount >= 10 else 1 if amount >= 1 else 2
    return f"{amount:.{digits}f} {unit}"


def render(text: str, layout: BaseLayout) -> str:
    """Return the page with every size as the layout gives it. Raises KeyError for a name that is not known."""

    def size(match: re.Match[str]) -> str:
        return f"<!-- size: {match[1]} -->{show(BYTES[match[1]](layout))}<!-- end -->"

    return re.sub(r"<!-- size: ([\w-]+) -->.*?<!-- end -->", size, text)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), sd15_layout()), encoding="utf-8")


if __name__ == "__main__":
    main()
