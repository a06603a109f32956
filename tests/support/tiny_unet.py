"""A Stable Diffusion UNet of two small blocks with random weights, as a base model without text encoder and VAE."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.engines.adapted_layers import CrossSlice
from hueshift.engines.added_embedding import added_width
from hueshift.engines.base_model import BaseModel, read_layout
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.interface import EngineRow
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors, decompose
from hueshift.engines.text_side import is_text_side

TOKENS, WIDTH = 5, 24
SD1_LIKE = {"attention_head_dim": 2}
"""Heads by count, 1x1 convolutions around the transformers."""
SD2_LIKE = {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True}
"""Heads that differ by block, linear layers around the transformers, v prediction."""

SDXL_LIKE = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 16, 32],
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
"""SDXL's blocks: none with attention at first, several transformer layers, pooled text and sizes."""


@dataclass(frozen=True)
class TinyParts:
    """A base model and what engines are made of."""

    base: BaseModel
    factors: SpectralFactors
    rows: RowLayout
    norms: dict[str, Tensor]

    def inputs(self, count: int, seed: int = 0, side: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, timesteps, and cross (or context, if the rows count the text side) of `count` samples."""
        generator = torch.Generator().manual_seed(seed)
        width = WIDTH if self.rows.text_side else CrossLayout(self.rows.layout).width
        return (
            torch.randn(count, 4, *side, generator=generator),
            torch.rand(count, generator=generator) * 999,
            torch.randn(count, TOKENS, width, generator=generator),
        )

    def added(self, count: int, seed: int = 0) -> Tensor | None:
        """What SDXL takes beside `inputs`; None for the others."""
        width = added_width(self.rows.layout)
        return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) if width else None

    def random_adapter(self, seed: int, kind: AdapterKind = AdapterKind.SPECTRAL) -> Adapter:
        """Shift every singular value and norm weight, or put a rank-2 product on every low-rank target."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        layout = self.rows.layout
        if kind is AdapterKind.SPECTRAL:
            return Adapter(
                kind,
                layout.base_hash,
                "svdiff",
                # Of the order of sigma itself, so that some values are clamped at zero.
                spectral={m.name: self.factors.sigma[m.name] * noise(m.rank) * 0.6 for m in layout.matrices},
                norm={n.name: 0.3 * noise(n.size) for n in layout.norms},
            )
        lowrank = {t.name: LowRankFactors(noise(2, t.cols), 0.1 * noise(t.rows, 2), 0.5) for t in self.rows.targets}
        return Adapter(kind, layout.base_hash, "residuals", lowrank=lowrank)

    def row(self, *mix: tuple[Adapter, float]) -> EngineRow:
        """Compose a row."""
        return self.rows.compose(mix, self.factors, self.norms)

    def merged_output(
        self, row: EngineRow, sample: Tensor, timestep: Tensor, context: Tensor, added: Tensor | None = None
    ) -> Tensor:
        """Output of diffusers' UNet whose weights were rebuilt for `row` in fp64: the truth the engines must meet."""
        unet = tiny_unet(self.base.unet.config)
        unet.load_state_dict(self.base.unet.state_dict())
        merge_row(unet, self, row)
        return run(unet, sample, timestep, context, added)


def merge_row(unet: nn.Module, parts: TinyParts, row: EngineRow) -> None:
    """Write W' = U diag(sigma') V^T + B A, computed in fp64, and the row's norm weights, into `unet`."""
    layout = parts.rows.layout
    shifts: dict[str, Tensor] = {}
    for target in parts.rows.targets if row.lowrank is not None else ():
        assert row.lowrank is not None
        a, b = row.lowrank[target.begin : target.end].double().split(target.sizes)  # type: ignore[no-untyped-call]
        shifts[target.name] = b.view(target.rows, target.rank) @ a.view(target.rank, target.cols)
    for layer in layout.matrices:
        weight = unet.get_parameter(f"{layer.name}.weight")
        matrix = weight.double().reshape(layer.rows, layer.cols)
        if row.spectral is not None:
            u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
            begin = layout.matrix_offsets[layer.name]
            delta = row.spectral[begin : begin + layer.rank].double() - parts.factors.sigma[layer.name].double()
            matrix = (u * (sigma + delta)) @ vh
        matrix = matrix + shifts.get(layer.name, 0.0)
        weight.data.copy_(matrix.reshape(weight.shape))
    for norm in layout.norms if row.spectral is not None else ():
        assert row.spectral is not None
        begin = layout.norm_offsets[norm.name]
        unet.get_parameter(f"{norm.name}.weight").data.copy_(row.spectral[begin : begin + norm.size])


def run(unet: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, added: Tensor | None = None) -> Tensor:
    """Output of a diffusers UNet, which reads its keys and values from `context` if that is a cross input, and what
    SDXL adds to the time embedding from `added`."""
    layout = CrossLayout(read_layout(unet, "", WIDTH))
    if context.shape[-1] == layout.width:
        unet = copy.deepcopy(unet)
        for name, span in layout.spans.items():
            attention, _, part = name.rpartition(".")
            setattr(unet.get_submodule(attention), part, CrossSlice(*span))
    if added is not None:
        unet = copy.copy(unet)
        cast(Any, unet).get_aug_embed = lambda **_: added
    with torch.no_grad():
        out: Tensor = unet(sample, timestep, encoder_hidden_states=context, return_dict=False)[0]
    return out


def tiny_unet(config: Any) -> nn.Module:
    """A UNet of this configuration in evaluation mode."""
    unet: nn.Module = UNet2DConditionModel.from_config(config)
    return unet.eval().requires_grad_(False)


def tiny_parts(
    variant: dict[str, Any],
    targets: tuple[str, ...] = ("proj_out", "to_q", "to_out.0"),
    rank: int = 4,
    unet: nn.Module | None = None,
    *,
    text_side: bool = False,
) -> TinyParts:
    """Build the base model of a variant (or of `unet`), its factors, and a row layout."""
    torch.manual_seed(11)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        **variant,
    }
    unet = unet or tiny_unet(config)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.data.add_(0.2 * torch.randn_like(module.weight))
            module.bias.data.add_(0.2 * torch.randn_like(module.bias))
    prediction = "v_prediction" if variant is SD2_LIKE else "epsilon"
    name = f"tiny-{prediction}"
    base = BaseModel(
        name=name,
        path=Path(name),
        base_hash=f"{prediction:a<64}",
        unet=unet,
        vae=None,
        text_encoder=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=TOKENS, hidden_size=WIDTH)),
        tokenizer=None,
        schedule=NoiseSchedule.from_config({"prediction_type": prediction}),
        layout=read_layout(unet, f"{prediction:a<64}", WIDTH),
        latent_channels=4,
        latent_factor=8,
        sample_size=8,
        size_multiple=16,
    )
    norms = read_norms(base.layout, lambda layer: unet.get_parameter(f"{layer}.weight"))
    return TinyParts(base, decompose(base), RowLayout(base.layout, targets, rank, text_side), norms)


def whole_adapter(parts: TinyParts, seed: int, share: float = 1.0) -> Adapter:
    """Random deltas of a share of the layers."""
    generator = torch.Generator().manual_seed(seed)
    layout = parts.rows.layout
    layers = [layer for layer in layout.matrices if not is_text_side(layer.name)]
    deltas = {
        layer.name: 0.05 * torch.randn(layer.rows, layer.cols, generator=generator)
        for layer in layers[: int(len(layers) * share)]
    }
    return Adapter(AdapterKind.DENSE, layout.base_hash, "dreambooth", dense=deltas)
