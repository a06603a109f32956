"""Load a Stable Diffusion 1.x or 2.x folder as diffusers writes it, and say clearly when it is not one."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, MatrixLayer, NormLayer
from hueshift.engines.noise_schedule import NoiseSchedule

_PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
_HASHED_PARTS = ("unet", "text_encoder")


@dataclass(frozen=True)
class BaseModel:
    """One base model: its networks (evaluation mode, no gradients), its noise schedule and what can be adapted in it.

    Pixels are `latent_factor` times latents along each side. `base_hash` is the SHA-256 of the UNet's and the text
    encoder's weights.
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
    _check_parts(path)
    unet_config = _read_config(path / "unet" / "config.json")
    _check_unet(path, unet_config)
    # Without low_cpu_mem_usage=False diffusers asks for accelerate, which nothing else here needs.
    options = {"torch_dtype": dtype, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", **options)
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae", **options)
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidArgument(
            Reason.MODEL_FILE_INVALID, f"{path}: a part of the base model cannot be read: {error}"
        ) from error
    for module in (unet, vae, text_encoder):
        module.to(device).eval().requires_grad_(False)
    base_hash = hash_weights(path)
    return BaseModel(
        name=path.name,
        path=path,
        base_hash=base_hash,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        schedule=NoiseSchedule.from_config(_read_config(path / "scheduler" / "scheduler_config.json")),
        layout=read_layout(unet, base_hash, int(text_encoder.config.hidden_size)),
        latent_channels=int(unet.config.in_channels),
        latent_factor=2 ** (len(vae.config.block_out_channels) - 1),
        sample_size=int(unet.config.sample_size),
        size_multiple=2 ** (len(vae.config.block_out_channels) - 1) * 2 ** (len(unet.config.block_out_channels) - 1),
    )


def read_layout(unet: nn.Module, base_hash: str, token_width: int) -> BaseLayout:
    """List the adaptable layers of a UNet in module order."""
    matrices: list[MatrixLayer] = []
    norms: list[NormLayer] = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            matrices.append(MatrixLayer(name, tuple(module.weight.shape)))
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            norms.append(NormLayer(name, module.weight.numel()))
    return BaseLayout(base_hash, tuple(matrices), tuple(norms), token_width)


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


def _check_parts(path: Path) -> None:
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise InvalidArgument(
            Reason.MODEL_UNSUPPORTED,
            f"{path} is not a diffusers model folder: it has no model_index.json. Give the folder of a Stable "
            "Diffusion 1.x or 2.x model as diffusers saves it.",
        )
    index = _read_config(index_file)
    for part, expected in _PARTS.items():
        found = index.get(part)
        given = found[1] if isinstance(found, list) and len(found) == 2 else None
        if given != expected and not (part == "tokenizer" and given == "CLIPTokenizerFast"):
            raise InvalidArgument(
                Reason.MODEL_UNSUPPORTED,
                f"{path}: {part} is {given or 'absent'}, but a Stable Diffusion 1.x or 2.x model has {expected}",
            )
        if not (path / part).is_dir():
            raise InvalidArgument(Reason.MODEL_FILE_INVALID, f"{path}: the folder {part}/ is missing")


def _check_unet(path: Path, config: dict[str, Any]) -> None:
    allowed = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    problems = []
    if not blocks or blocks - allowed:
        problems.append(f"block types {sorted(blocks - allowed) or 'absent'} (supported: {sorted(allowed)})")
    if config.get("addition_embed_type") is not None:
        problems.append(f"addition_embed_type {config['addition_embed_type']} (supported: none; SDXL has text_time)")
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        problems.append("class embeddings (supported: none)")
    if config.get("in_channels") != config.get("out_channels"):
        problems.append(
            f"{config.get('in_channels')} input and {config.get('out_channels')} output channels (they must be equal; "
            "inpainting models differ)"
        )
    if problems:
        raise InvalidArgument(Reason.MODEL_UNSUPPORTED, f"{path}: the UNet has {'; '.join(problems)}")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InvalidArgument(Reason.MODEL_FILE_INVALID, f"{file} cannot be read: {error}") from error
