"""A UNet's residual blocks, norms and gates on Triton kernels, for calls that are not compiled.

What diffusers' modules do between two products is a chain of passes over the activations, and torch's group norm
changes the memory layout twice: together half of a captured step of Stable Diffusion 1.5 (batch 16, one H200,
2026-11-20). Here a residual block is two norms with all that stands around them, two convolutions without their biases,
and one sum. torch.compile finds the same by itself, so networks that it compiles keep diffusers' modules.

Every module takes over the parameters of the one it replaces, under the same names.
"""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from hueshift.engines.adapted_layers import RowGroupNorm
from hueshift.engines.cuda_layers import SlabRows, as_pixels, as_tokens
from hueshift.engines.fused_tokens import FusedGate, FusedTokenBlock, fuse_norms
from hueshift.kernels.group_norm import group_norm
from hueshift.kernels.residual_add import residual_add


class FusedGroupNorm(nn.Module):
    """Group norm with the layer's weights or those of each sample's slot, and SiLU after it where `silu` is set."""

    def __init__(self, layer: nn.GroupNorm | RowGroupNorm, rows: SlabRows) -> None:
        super().__init__()
        self.rows = rows
        self.silu = False
        self.eps = layer.eps
        self.name = layer.name if isinstance(layer, RowGroupNorm) else None
        self.groups = layer.groups if isinstance(layer, RowGroupNorm) else layer.num_groups
        self.bias = layer.bias
        if isinstance(layer, nn.GroupNorm):
            self.weight = layer.weight

    def forward(self, x: Tensor, shift: Tensor | None = None, shift_bias: Tensor | None = None) -> Tensor:
        """Normalise x [N, channels, h, w], plus shift [N, channels] and shift_bias [channels] where given."""
        x = x.contiguous(memory_format=torch.channels_last)
        given: dict[str, Any] = {"shift": shift, "shift_bias": shift_bias, "silu": self.silu}
        if self.name is None:
            return group_norm(x, self.weight, self.bias, self.groups, self.eps, **given)
        weights, index = self.rows.sigma[self.name], self.rows.indices()
        return group_norm(x, weights, self.bias, self.groups, self.eps, index=index, **given)


class PixelLinear(nn.Module):
    """A 1x1 convolution as a product on pixels, whose bias costs no pass of its own."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, h, w] to [N, out, h, w], channels_last."""
        return as_pixels(functional.linear(as_tokens(x), self.weight.flatten(1), self.bias), x)


class FusedResnet(nn.Module):
    """diffusers' ResnetBlock2D as Stable Diffusion and its autoencoder have it; see `fits`."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.time_emb_proj = block.time_emb_proj
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut
        # Set where the embedding has its activation already, which is the same for all blocks.
        self.activated = False
        for norm in (block.norm1, block.norm2):
            norm.silu = True

    @staticmethod
    def fits(block: ResnetBlock2D) -> bool:
        """True for a block that changes no size and adds the time embedding, if any, between its convolutions."""
        return (
            block.time_embedding_norm == "default"
            and not block.skip_time_act
            and block.upsample is None
            and block.downsample is None
            and block.output_scale_factor == 1
            and isinstance(block.nonlinearity, nn.SiLU)
            and all(isinstance(norm, FusedGroupNorm) for norm in (block.norm1, block.norm2))
        )

    def forward(self, x: Tensor, temb: Tensor | None, *_: Any, **__: Any) -> Tensor:
        """Map [N, c_in, h, w] and an embedding [N, width] to [N, c_out, h, w], channels_last."""
        hidden, bias = convolve(self.conv1, self.norm1(x))
        # An autoencoder's blocks have none.
        embedded = None
        if temb is not None:
            embedded = self.time_emb_proj(temb if self.activated else functional.silu(temb))
        hidden, bias = convolve(self.conv2, self.norm2(hidden, embedded, bias))
        kept = x if self.conv_shortcut is None else self.conv_shortcut(x)
        layout = torch.channels_last
        return residual_add(kept.contiguous(memory_format=layout), hidden.contiguous(memory_format=layout), bias)


class FusedTransformer(nn.Module):
    """diffusers' Transformer2DModel on pictures, without its two changes of layout; see `fits`."""

    def __init__(self, block: Transformer2DModel) -> None:
        super().__init__()
        self.on_tokens = block.use_linear_projection
        self.norm, self.proj_in = block.norm, block.proj_in
        self.transformer_blocks, self.proj_out = block.transformer_blocks, block.proj_out
        for key, child in list(self.transformer_blocks._modules.items()):
            if isinstance(child, BasicTransformerBlock) and FusedTokenBlock.fits(child):
                self.transformer_blocks._modules[key] = FusedTokenBlock(child)

    @staticmethod
    def fits(block: Transformer2DModel) -> bool:
        """True for one that reads a picture and gives one of as many channels."""
        return block.is_input_continuous and isinstance(block.norm, FusedGroupNorm)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """Map [N, channels, h, w], with a context for cross-attention, to the same, channels_last."""
        x = hidden_states.contiguous(memory_format=torch.channels_last)
        normal = self.norm(x)
        tokens = self.proj_in(as_tokens(normal)) if self.on_tokens else as_tokens(self.proj_in(normal))
        masks, given = (attention_mask, encoder_attention_mask), cross_attention_kwargs or {}
        pending: Tensor | None = None
        for block in self.transformer_blocks:
            if isinstance(block, FusedTokenBlock):
                tokens, pending = block(tokens, pending, encoder_hidden_states, *masks, given)
            else:
                tokens = tokens if pending is None else tokens + pending
                pending = None
                tokens = block(
                    tokens,
                    attention_mask=attention_mask,
                    encoder_hidden_states=encoder_hidden_states,
                    encoder_attention_mask=encoder_attention_mask,
                    cross_attention_kwargs=cross_attention_kwargs,
                )
        tokens = tokens if pending is None else tokens + pending
        out = as_pixels(self.proj_out(tokens), x) if self.on_tokens else self.proj_out(as_pixels(tokens, x))
        return (residual_add(x, out.contiguous(memory_format=torch.channels_last)),)


def convolve(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve, and return apart what is still to be added to each channel: cuDNN's bias would be a pass of its own."""
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        out = functional.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return out, layer.bias
    return layer(x), None


def fuse_blocks(unet: nn.Module, rows: SlabRows) -> int:
    """Put these modules in the place of a UNet's own and return how many.

    For pictures in channels_last. Norms of each slot's weights read the slabs of `rows`; layers that were replaced
    before (cuda_layers.py) stay what they are.
    """
    replaced = 0
    for parent in list(unet.modules()):
        for key, child in list(parent._modules.items()):
            made = _fused(key, child, rows)
            if made is not None:
                parent._modules[key] = made
                replaced += 1
            if isinstance(child, BasicTransformerBlock):
                replaced += fuse_norms(child, rows)
    # Their norms are fused by now.
    for parent in list(unet.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, Transformer2DModel) and FusedTransformer.fits(child):
                parent._modules[key] = FusedTransformer(child)
                replaced += 1
            if isinstance(child, ResnetBlock2D) and FusedResnet.fits(child):
                parent._modules[key] = FusedResnet(child)
                replaced += 1
    _fuse_output(unet)
    _activate_once(unet)
    return replaced


def _fused(key: str, child: nn.Module | None, rows: SlabRows) -> nn.Module | None:
    # An autoencoder's attention normalises tokens.
    if isinstance(child, nn.GroupNorm | RowGroupNorm) and key != "group_norm":
        return FusedGroupNorm(child, rows)
    if type(child) is GEGLU:
        return FusedGate(child)
    if type(child) is nn.Conv2d and key in ("proj_in", "proj_out", "conv_shortcut") and _is_product(child):
        return PixelLinear(child)
    return None


def _is_product(layer: nn.Conv2d) -> bool:
    plain = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((1, 1), (1, 1), (0, 0), (1, 1))
    return plain and layer.groups == 1


def _fuse_output(unet: nn.Module) -> None:
    """Let the last norm do the activation after it."""
    norm, act = unet._modules.get("conv_norm_out"), unet._modules.get("conv_act")
    if isinstance(norm, FusedGroupNorm) and isinstance(act, nn.SiLU):
        norm.silu = True
        unet._modules["conv_act"] = nn.Identity()


def _activate_once(unet: nn.Module) -> None:
    """Let the time embedding's activation be done for all residual blocks at once, if all of them are fused."""
    kinds = {type(module) for module in unet.modules()}
    if getattr(unet, "time_embed_act", unet) is None and FusedResnet in kinds and ResnetBlock2D not in kinds:
        unet.time_embed_act = nn.SiLU()
        for module in unet.modules():
            if isinstance(module, FusedResnet):
                module.activated = True
