"""A tiny Stable Diffusion UNet, and the same UNet with one of our adapters written into its weights: what a file must
give, whichever program wrote it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.formats.draft import ImportBase
from hueshift.engines.base_model import read_layout

WIDTH = 24
BASE_HASH = "c0" * 32
CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}


def foreign_unet(**changes: Any) -> nn.Module:
    """The UNet, seeded, with norms whose weights are not all one. Every call gives equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet: nn.Module = UNet2DConditionModel(**{**CONFIG, **changes})
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.weight.data.add_(0.2 * torch.randn_like(module.weight))
    return unet.eval().requires_grad_(False)


def base_of(unet: nn.Module) -> ImportBase:
    """What importers know of a UNet."""
    parameters = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    return ImportBase(read_layout(unet, BASE_HASH, WIDTH), parameters)


def randomize(parameters: Any, seed: int = 0, size: float = 0.05) -> None:
    """Fill trainable parameters with seeded noise: freshly made adapters change nothing."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(size * torch.randn(parameter.shape, generator=draw))


def run(unet: nn.Module, seed: int = 3) -> Tensor:
    """Output of a UNet for seeded inputs of two samples."""
    draw = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8, generator=draw)
    context = torch.randn(2, 5, WIDTH, generator=draw)
    with torch.no_grad():
        out: Tensor = unet(sample, torch.tensor([3.0, 700.0]), encoder_hidden_states=context, return_dict=False)[0]
    return out


def adapted(unet: nn.Module, adapter: Adapter) -> nn.Module:
    """Write an adapter into the weights of a UNet, in fp64: W + s B A, W + dW, U relu(sigma + delta) V^T, w + shift."""
    for layer, part in adapter.lowrank.items():
        weight = unet.get_parameter(f"{layer}.weight")
        change = part.scale * (part.b.double() @ part.a.double())
        weight.data.copy_(weight.double() + change.reshape(weight.shape))
    for layer, shift in adapter.spectral.items():
        weight = unet.get_parameter(f"{layer}.weight")
        u, sigma, vh = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
        weight.data.copy_(((u * torch.relu(sigma + shift.double())) @ vh).reshape(weight.shape))
    for layer, delta in (*adapter.kv.items(), *adapter.dense.items()):
        weight = unet.get_parameter(f"{layer}.weight")
        weight.data.copy_(weight.double() + delta.double().reshape(weight.shape))
    for layer, shift in adapter.norm.items():
        weight = unet.get_parameter(f"{layer}.weight")
        weight.data.copy_(weight.double() + shift.double())
    return unet


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two outputs, relative to the largest output."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def only_file(folder: Path) -> bytes:
    """The bytes of the folder's only safetensors file."""
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()
