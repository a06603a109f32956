"""What other programs call the layers of the base model. One table for every format; torch is not needed.

A layer of the UNet may be written as diffusers does (`down_blocks.0.resnets.0.conv1`), as the first Stable Diffusion
code did (`input_blocks.1.0.in_layers.2`), and either of them with `_` for `.` (kohya, LyCORIS). A layer of a text
encoder is written as transformers does, or with `_` too.
"""

import re
from collections.abc import Iterator
from enum import StrEnum

from hueshift.adapters.layout import ENCODERS, BaseLayout


class Part(StrEnum):
    """Which network a tensor belongs to."""

    UNET = "UNet"
    TEXT = "text encoder"
    OTHER = "other"


# Longest first, so that `unet.` is also removed after `base_model.model.`.
_UNET_PREFIX = re.compile(
    r"^(?:(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|unet\.)+|lora_unet_|lycoris_unet_|lycoris_)"
)
_TEXT_PREFIX = re.compile(
    r"^(?:base_model\.model\.)?(?:lora_te\d?_|lycoris_te\d?_|lycoris_text_model_|text_encoder(?:_2)?[.:]|te\d?\.|"
    r"text_model\.|cond_stage_model\.|conditioner\.)"
)
_ENCODER_NUMBER = re.compile(r"^(?:base_model\.model\.)?(?:lora_te|lycoris_te|te|text_encoder_)(\d)")
# What transformers' classes put before the layers, and what PEFT puts before that.
_TEXT_ROOT = re.compile(r"^(?:base_model\.model\.)?(?:text_model[._])?")
# Projections as the first diffusers with LoRA named them in text encoders too.
_FIRST_DIFFUSERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_OTHER_PREFIX = re.compile(
    r"^(?:vae\.|first_stage_model\.|model_ema\.|denoiser\.|safety_checker\.|betas$|alphas_|sqrt_|log_one_|posterior_)"
)
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"mid_block.resnets.0": 0, "mid_block.attentions.0": 1, "mid_block.resnets.1": 2}


def split_part(name: str) -> tuple[Part, str]:
    """Return which network a foreign module or tensor name belongs to, and the name within that network."""
    if _OTHER_PREFIX.match(name):
        return Part.OTHER, name
    text = _TEXT_PREFIX.match(name)
    if text:
        return Part.TEXT, name[text.end() :]
    prefix = _UNET_PREFIX.match(name)
    return Part.UNET, name[prefix.end() :] if prefix else name


class LayerNames:
    """Finds the base model's layer of a foreign name."""

    def __init__(self, layout: BaseLayout) -> None:
        names = [layer.name for layer in layout.matrices] + [layer.name for layer in layout.norms]
        first_code = _first_code_blocks(names)
        spelled: dict[str, str | None] = {}
        for name in names:
            for spelling in {form for dotted in _spellings(name, first_code) for form in (dotted, _flat(dotted))}:
                # Two layers of one spelling: neither is meant.
                spelled[spelling] = name if spelled.get(spelling, name) == name else None
        self._layer_of = spelled

    def find(self, foreign: str) -> str | None:
        """Return the layer of a name without its network's prefix; None if there is none, or more than one."""
        return self._layer_of.get(foreign)


class EncoderNames:
    """Finds the layer of a text encoder that a foreign name means."""

    def __init__(self, layout: BaseLayout) -> None:
        self._layer_of: dict[tuple[str, str], str] = {}
        for name in layout.encoder_names():
            encoder, _, path = name.partition(".")
            block, _, last = path.rpartition(".")
            paths = [path] + ([f"{block}.{_FIRST_DIFFUSERS[last]}"] if last in _FIRST_DIFFUSERS else [])
            for spelling in paths:
                self._layer_of |= {(encoder, spelling): name, (encoder, _flat(spelling)): name}

    def find(self, foreign: str) -> str | None:
        """Return the layer of a name with its network's prefix; None if there is none."""
        part, name = split_part(foreign)
        if part is not Part.TEXT:
            return None
        numbered = _ENCODER_NUMBER.match(foreign)
        number = int(numbered[1]) if numbered else 1
        if not 1 <= number <= len(ENCODERS):
            return None
        return self._layer_of.get((ENCODERS[number - 1], _TEXT_ROOT.sub("", name)))


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _spellings(name: str, blocks: dict[str, str]) -> Iterator[str]:
    yield name
    if name.endswith(".to_out.0"):
        # The projection after attention, before diffusers put a dropout beside it.
        yield name.removesuffix(".0")
    if name in _ENDS:
        yield _ENDS[name]
    if name in blocks:
        yield blocks[name]
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        block, inner = ".".join(parts[:cut]), ".".join(parts[cut:])
        if block in blocks:
            yield f"{blocks[block]}.{_RESNET.get(inner, inner)}"
            return


def _first_code_blocks(names: list[str]) -> dict[str, str]:
    """Map blocks of diffusers to those of the first Stable Diffusion code, where all blocks are numbered in a row."""
    blocks = {block: f"middle_block.{place}" for block, place in _MIDDLE.items()}
    present = {found[0] for name in names for found in [re.match(r"\w+_blocks\.\d+\.\w+\.\d+", name)] if found}
    number = 1
    for block in _count(present, "down_blocks.{}.resnets.0"):
        for place in _count(present, f"down_blocks.{block}.resnets.{{}}"):
            blocks[f"down_blocks.{block}.resnets.{place}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{block}.attentions.{place}"] = f"input_blocks.{number}.1"
            number += 1
        if f"down_blocks.{block}.downsamplers.0" in present:
            blocks[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block in _count(present, "up_blocks.{}.resnets.0"):
        places = list(_count(present, f"up_blocks.{block}.resnets.{{}}"))
        for place in places:
            blocks[f"up_blocks.{block}.resnets.{place}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{block}.attentions.{place}"] = f"output_blocks.{number}.1"
            if place == places[-1] and f"up_blocks.{block}.upsamplers.0" in present:
                after = 2 if f"up_blocks.{block}.attentions.{place}" in present else 1
                blocks[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number}.{after}.conv"
            number += 1
    return blocks


def _count(present: set[str], pattern: str) -> Iterator[int]:
    number = 0
    while pattern.format(number) in present:
        yield number
        number += 1
