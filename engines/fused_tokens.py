"""The token side of a UNet on Triton kernels: norms, gates, and each sum of a block with the norm behind it.

Every module takes over the parameters of the one it replaces, under the same names (fused_blocks.py).
"""

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from hueshift.engines.adapted_layers import RowLayerNorm
from hueshift.engines.cuda_layers import SlabRows
from hueshift.kernels.gated_gelu import gated_gelu
from hueshift.kernels.layer_norm import add_layer_norm, layer_norm


class FusedLayerNorm(nn.Module):
    """Layer norm over tokens [N, T, width] with the layer's weights or those of each sample's slot."""

    def __init__(self, layer: nn.LayerNorm | RowLayerNorm, rows: SlabRows) -> None:
        super().__init__()
        self.eps, self.rows = layer.eps, rows
        self.name = layer.name if isinstance(layer, RowLayerNorm) else None
        self.bias = layer.bias
        if isinstance(layer, nn.LayerNorm):
            self.weight = layer.weight

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """True for one over the last dimension, with weights and a bias."""
        if isinstance(layer, RowLayerNorm):
            return True
        return type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, index = self._weights()
        return layer_norm(x.contiguous(), weight, self.bias, self.eps, index=index)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + residual, and that normalised."""
        weight, index = self._weights()
        return add_layer_norm(x.contiguous(), residual.contiguous(), weight, self.bias, self.eps, index=index)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        if self.name is None:
            return self.weight, None
        return self.rows.sigma[self.name], self.rows.indices()


class FusedGate(nn.Module):
    """GEGLU (Shazeer 2020): a product of twice the width, of which one half gates the other."""

    def __init__(self, layer: GEGLU) -> None:
        super().__init__()
        self.proj = layer.proj

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, T, width] to [N, T, inner width]."""
        return gated_gelu(self.proj(tokens))


class FusedTokenBlock(nn.Module):
    """diffusers' BasicTransformerBlock as Stable Diffusion has it; see `fits`.

    It takes what the block before still has to add to its tokens, and gives its own last summand on, for the next norm
    to add.
    """

    def __init__(self, block: BasicTransformerBlock) -> None:
        super().__init__()
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff

    @staticmethod
    def fits(block: BasicTransformerBlock) -> bool:
        """True for self-attention, cross-attention and a feed-forward layer, each behind a fused norm."""
        return (
            block.norm_type == "layer_norm"
            and not block.only_cross_attention
            and block.pos_embed is None
            and block.attn2 is not None
            and block._chunk_size is None
            and not hasattr(block, "fuser")
            and all(isinstance(norm, FusedLayerNorm) for norm in (block.norm1, block.norm2, block.norm3))
        )

    def forward(
        self,
        tokens: Tensor,
        pending: Tensor | None,
        context: Tensor | None,
        attention_mask: Tensor | None,
        context_mask: Tensor | None,
        given: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Map tokens [N, T, width] and what is to be added to them, with a context for cross-attention, to the same.

        `given` are further arguments of both attentions.
        """
        if pending is None:
            normal = self.norm1(tokens)
        else:
            tokens, normal = self.norm1.add(tokens, pending)
        mixed = self.attn1(normal, encoder_hidden_states=None, attention_mask=attention_mask, **given)
        tokens, normal = self.norm2.add(tokens, mixed)
        mixed = self.attn2(normal, encoder_hidden_states=context, attention_mask=context_mask, **given)
        tokens, normal = self.norm3.add(tokens, mixed)
        return tokens, self.ff(normal)


def fuse_norms(block: BasicTransformerBlock, rows: SlabRows) -> int:
    """Put fused norms into a block and return how many."""
    replaced = 0
    for key in ("norm1", "norm2", "norm3"):
        norm = block._modules.get(key)
        if norm is not None and FusedLayerNorm.fits(norm):
            block._modules[key] = FusedLayerNorm(norm, rows)
            replaced += 1
    return replaced
