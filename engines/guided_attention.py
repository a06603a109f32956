"""Attention of the FULL plan in torch: LAG masks from cross-attention, and self-attention shared between samples."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.engines.adapted_layers import CallRows, transformer_of
from hueshift.engines.interface import Guides
from hueshift.kernels.lag_mask import attention_share, binarise, binarise_reference, share_reference

_EPS = 1e-5


@dataclass
class CallGuides:
    """The guides of the call in progress, if it has any, and the masks it has made so far.

    With `in_torch` masks are torch's on a GPU too, where all probabilities of a block are in memory at a time.
    """

    in_torch: bool = False
    guides: Guides | None = None
    height: int = 0
    width: int = 0
    shares: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, guides: Guides, height: int, width: int) -> None:
        """Start a call on latents of `height` x `width`."""
        self.guides, self.height, self.width = guides, height, width

    def end(self) -> None:
        """Forget the call."""
        self.guides = None
        self.shares, self.masks = {}, {}

    def picture(self) -> Tensor:
        """Mean of the masks at the latents' resolution, [N, height, width]."""
        grids: list[Tensor] = []
        for mask in self.masks.values():
            scale = round((self.height * self.width / mask.shape[1]) ** 0.5)
            grid = mask.view(-1, 1, self.height // scale, self.width // scale)
            grids.append(functional.interpolate(grid, (self.height, self.width), mode="nearest")[:, 0])
        # Not from a zero of the host's: to bring that to a GPU, the host would wait for the whole call.
        return sum(grids[1:], grids[0]) / len(grids) if grids else torch.zeros(())


class SharedSelfAttention:
    """StyleAligned (Hertz et al. 2023): queries and keys take the reference's statistics, and its keys join.

    Q and K of a row are normalised per head and channel over positions and given the reference's mean and deviation
    (AdaIN, Huang and Belongie 2017); the row then attends to its own and the reference's keys and values. A row that is
    its own reference sees every key twice, which leaves its attention as it was.
    """

    def __init__(self, guides: CallGuides) -> None:
        self._guides = guides

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Map [N, positions, width] to the same."""
        query, key, value = (
            split_heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        guides = self._guides.guides
        if guides is not None:
            query, key, value = self._share(query, key, value, guides.reference)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out

    def _share(self, query: Tensor, key: Tensor, value: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shares = (reference != torch.arange(len(reference), device=reference.device)).view(-1, 1, 1, 1)
        query = torch.where(shares, adapt_statistics(query, query[reference]), query)
        key = torch.where(shares, adapt_statistics(key, key[reference]), key)
        return query, torch.cat([key, key[reference]], 2), torch.cat([value, value[reference]], 2)


class ConfiningCrossAttention:
    """Cross-attention that leaves its transformer's LAG mask behind (Ham et al. 2024).

    The transformer's branches after it are confined: to_out and the feed-forward of the same block, later blocks, and
    proj_out, which is where the paper has its residuals. With several blocks the attention of all so far is summed.
    """

    def __init__(self, name: str, guides: CallGuides, rows: CallRows) -> None:
        self._transformer = transformer_of(name)
        self._guides = guides
        self._rows = rows

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Map [N, positions, width] and the keys and values [N, tokens, ...] to [N, positions, width]."""
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = (split_heads(layer(encoder_hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v))
        if self._guides.guides is not None:
            self._confine(query, key, self._guides.guides)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out

    def _confine(self, query: Tensor, key: Tensor, guides: Guides) -> None:
        call, at = self._guides, self._transformer
        look, halve = (share_reference, binarise_reference) if call.in_torch else (attention_share, binarise)
        share = look(query, key, guides.lag.contiguous(), query.shape[-1] ** -0.5)
        call.shares[at] = share + call.shares[at] if at in call.shares else share
        call.masks[at] = self._rows.masks[at] = halve(call.shares[at])[guides.lag_source]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turn [N, positions, heads * width] into [N, heads, positions, width]."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def adapt_statistics(x: Tensor, reference: Tensor) -> Tensor:
    """AdaIN over positions: x [N, heads, positions, width] with the mean and deviation of `reference`, fp32 inside."""
    own, other = x.float(), reference.float()
    own_deviation = (own.var(2, correction=0, keepdim=True) + _EPS).sqrt()
    deviation = (other.var(2, correction=0, keepdim=True) + _EPS).sqrt()
    return ((own - own.mean(2, keepdim=True)) / own_deviation * deviation + other.mean(2, keepdim=True)).to(x.dtype)
