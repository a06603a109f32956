"""Load a Stable Diffusion 1.x, 2.x or XL folder as diffusers writes it, and say clearly when it is not one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, MatrixLayer, NormLayer
from hueshift.engines.encoder_layers import read_encoder_layout
from hueshift.engines.model_folder import check_parts, check_unet, check_xl, read_config, read_index
from hueshift.engines.noise_schedule import NoiseSchedule

# The parts whose weights say which model it is; the second one is SDXL's.
_HASHED_PARTS = ("unet", "text_encoder", "text_encoder_2")
_READ_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


class Architecture(StrEnum):
    """What kind of model the UNet is."""

    SD = "stable-diffusion"
    """Stable Diffusion 1.x and 2.x: one text encoder."""

    SDXL = "stable-diffusion-xl"
    """Stable Diffusion XL (Podell et al. 2023): two text encoders, conditioned on pooled text and sizes too."""


@dataclass(frozen=True, slots=True, eq=False)
class XlParts:
    """What SDXL has beside the parts of Stable Diffusion 1.x and 2.x.

    The second encoder's tokens are those of the first, but for its padding. With `zero_empty_prompt` an empty prompt
    has zeros for context and pooled text, as the model saw unconditional pictures in training.
    """

    text_encoder: Any
    tokenizer: Any
    zero_empty_prompt: bool = True


@dataclass(frozen=True)
class BaseModel:
    """One base model: its networks (evaluation mode, no gradients), its noise schedule and what can be adapted in it.

    Pixels are `latent_factor` times latents along each side. `base_hash` is the SHA-256 of the UNet's and the text
    encoders' weights. `xl` is None for Stable Diffusion 1.x and 2.x.
    """

    name: str
    path: Path
    base_hash: str
    unet: nn.Module
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: NoiseSchedule
    layout: BaseLayout
    latent_channels: int
    latent_factor: int
    sample_size: int
    size_multiple: int
    xl: XlParts | None = None

    @property
    def architecture(self) -> Architecture:
        """Stable Diffusion or SDXL."""
        return Architecture.SD if self.xl is None else Architecture.SDXL

    @property
    def max_tokens(self) -> int:
        """Tokens the text encoder reads, both end marks included."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def pixels(self) -> int:
        """Native width and height."""
        return self.sample_size * self.latent_factor


def load_base_model(path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> BaseModel:
    """Load the folder at `path`.

    Raises InvalidArgument (MODEL_UNSUPPORTED, MODEL_FILE_INVALID) naming the part that does not fit.
    """
    path = path.expanduser().resolve()
    index = read_index(path)
    unet_config = read_config(path / "unet" / "config.json")
    is_xl = unet_config.get("addition_embed_type") == "text_time"
    check_parts(path, index, is_xl=is_xl)
    check_unet(path, unet_config)
    # Without low_cpu_mem_usage=False diffusers asks for accelerate, which nothing else here needs.
    options = {"torch_dtype": dtype, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", **options)
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae", **_vae_options(path, options, is_xl=is_xl))
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        xl = _load_xl(path, index, dtype) if is_xl else None
    except _READ_ERRORS as error:
        raise InvalidArgument(
            Reason.MODEL_FILE_INVALID, f"{path}: a part of the base model cannot be read: {error}"
        ) from error
    for module in (unet, vae, text_encoder, *([xl.text_encoder] if xl else [])):
        module.to(device).eval().requires_grad_(False)
    base_hash = hash_weights(path)
    widths = [int(text_encoder.config.hidden_size)]
    if xl is not None:
        widths.append(int(xl.text_encoder.config.hidden_size))
        projection = int(xl.text_encoder.config.projection_dim)
        check_xl(path, unet.config, widths, (tokenizer, xl.tokenizer), projection)
    return BaseModel(
        name=path.name,
        path=path,
        base_hash=base_hash,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        schedule=NoiseSchedule.from_config(read_config(path / "scheduler" / "scheduler_config.json")),
        layout=read_layout(
            unet,
            base_hash,
            sum(widths),
            tuple(widths) if xl else (),
            (text_encoder,) if xl is None else (text_encoder, xl.text_encoder),
        ),
        latent_channels=int(unet.config.in_channels),
        latent_factor=2 ** (len(vae.config.block_out_channels) - 1),
        sample_size=int(unet.config.sample_size),
        size_multiple=2 ** (len(vae.config.block_out_channels) - 1) * 2 ** (len(unet.config.block_out_channels) - 1),
        xl=xl,
    )


def read_layout(
    unet: nn.Module,
    base_hash: str,
    token_width: int,
    token_parts: tuple[int, ...] = (),
    encoders: Sequence[nn.Module] = (),
) -> BaseLayout:
    """List the adaptable layers of a UNet and of text encoders in module order; `token_parts` are the widths of SDXL's
    text encoders."""
    matrices: list[MatrixLayer] = []
    norms: list[NormLayer] = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            matrices.append(MatrixLayer(name, tuple(module.weight.shape)))
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            norms.append(NormLayer(name, module.weight.numel()))
    return BaseLayout(
        base_hash, tuple(matrices), tuple(norms), token_width, token_parts, *read_encoder_layout(encoders)
    )


def hash_weights(path: Path) -> str:
    """SHA-256 over the stored tensors of the UNet and the text encoder: names, dtypes, shapes and bytes, by name.

    The header's order and metadata do not count, so saving the same weights again keeps the hash.
    """
    digest = hashlib.sha256()
    for part in _HASHED_PARTS:
        for file in sorted((path / part).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for key in sorted(tensors.keys()):
                    tensor = tensors.get_tensor(key).contiguous()
                    digest.update(f"{part}/{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _vae_options(path: Path, options: Mapping[str, Any], *, is_xl: bool) -> dict[str, Any]:
    """In fp32 where SDXL's config asks for that: its original VAE overflows fp16 and gives black pictures."""
    upcast = is_xl and bool(read_config(path / "vae" / "config.json").get("force_upcast", True))
    return {**options, "torch_dtype": torch.float32} if upcast else dict(options)


def _load_xl(path: Path, index: Mapping[str, Any], dtype: torch.dtype) -> XlParts:
    return XlParts(
        CLIPTextModelWithProjection.from_pretrained(
            path, subfolder="text_encoder_2", dtype=dtype, use_safetensors=True
        ),
        CLIPTokenizer.from_pretrained(path, subfolder="tokenizer_2"),
        zero_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
    )
