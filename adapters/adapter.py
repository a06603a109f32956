"""An adapter in memory: what one user taught the base model, as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only for annotations: looking at a file must not wait for torch.
    from torch import Tensor


class AdapterKind(StrEnum):
    """What an adapter mainly is. Spectral and low-rank ones may also shift norm weights, and all may teach words."""

    SPECTRAL = "spectral"
    LOWRANK = "lowrank"
    TOKENS = "tokens"
    """Learned words alone: Textual Inversion, P+, ProSpect, NeTI; the UNet is unchanged."""

    KV = "kv"
    """Deltas of cross-attention keys and values: Custom Diffusion, Perfusion."""

    DENSE = "dense"
    """Full deltas of weight matrices: DreamBooth with no rank, full differences. May hold all that the others hold."""


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """W' = W + scale * B A for one layer: A is [rank, cols], B is [rows, rank]."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class MapperLayer:
    """One hidden layer of a TokenMapper: linear, then layer norm, then leaky ReLU (slope 0.01).

    `weight` [out, in], `bias`, `norm_weight` and `norm_bias` [out].
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


@dataclass(frozen=True, slots=True)
class TokenMapper:
    """A word's embedding as a function of timestep and cross-attention layer (NeTI, Alaluf et al. 2023).

    The input is p = (t / train steps, layer / layers), layers counted in the order of BaseLayout.cross_attentions;
    `frequencies` [features, 2] give the Fourier features cos(2 pi f p) followed by sin(2 pi f p); then the hidden
    `layers`. `output_weight` [width or 2 width, hidden] and `output_bias` make the embedding and, with twice the width,
    the textual bypass after it. The whole output, both halves together, is scaled to length `norm`, unless that is 0.
    With the bypass v, the text encoder's last hidden state e at the word's place, before the final layer norm, becomes
    e + `bypass` |e| v / |v|; values see this one, keys the plain e. Norm, place and values only are those of the
    authors' program.
    """

    frequencies: Tensor
    layers: tuple[MapperLayer, ...]
    output_weight: Tensor
    output_bias: Tensor
    norm: float
    bypass: float = 0.2


@dataclass(frozen=True, slots=True)
class GatedEdit:
    """A gated rank-1 edit of keys and values (Perfusion, Tewel et al. 2023, section 4).

    With i* = `target` [width] and C^-1 i* = `dual` [width], s(e) = <dual, e> / <dual, i*> tells how much of an encoded
    token e is the concept. A layer's output becomes W (e - s(e) i*) + g(e) o*, where o* = `outputs[layer]` [rows] and
    g(e) = 1 / (1 + exp(-(s(e) - beta) / tau)).
    """

    target: Tensor
    dual: Tensor
    outputs: Mapping[str, Tensor]
    beta: float
    tau: float


@dataclass(frozen=True, slots=True)
class EncoderChange:
    """What an adapter changes in the text encoder, in SDXL's two: layers by their names in the base layout.

    `spectral` [rank], `norm` [size] and `lowrank` mean what they mean in Adapter.
    """

    spectral: Mapping[str, Tensor] = field(default_factory=dict)
    norm: Mapping[str, Tensor] = field(default_factory=dict)
    lowrank: Mapping[str, LowRankFactors] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """True if it changes any layer."""
        return bool(self.spectral or self.norm or self.lowrank)


@dataclass(frozen=True)
class Adapter:
    """One adapter, bound to the base model whose hash it names.

    `spectral` maps a matrix layer to the shifts of its singular values [rank]; `norm` maps a norm layer to the shifts
    of its weights [size]. `lowrank` maps a matrix layer to its factors. Absent layers are unchanged. All these are
    layers of the UNet; `encoder` has the same of the text encoder.

    A placeholder word is taught in one of three ways: `tokens` has its embeddings [vectors, token_width]; `token_grids`
    has [stages, layers, vectors, token_width], where stages is 1 or the number of equal parts of the sampling
    timesteps, first at high noise (ProSpect, Zhang et al. 2023), and layers is 1 or the number of cross-attention
    layers (P+, Voynov et al. 2023), in the order of BaseLayout.cross_attentions; `mappers` has a network. What is 1
    holds for all.

    `kv` maps to_k and to_v layers of cross-attention to full deltas [rows, cols] (Custom Diffusion, Kumari et al.
    2023); `gated` maps a word to its Perfusion edit. `class_noun` is the class of what was taught, if known; LAG
    sampling looks for it in the prompt.

    `dense` maps a matrix layer of the UNet to its full delta [rows, cols], flattened like every matrix of BaseLayout.
    Layers of the text side (to_k and to_v of cross-attention) are never among them: their deltas are in `kv`.
    """

    kind: AdapterKind
    base_hash: str
    method: str
    spectral: Mapping[str, Tensor] = field(default_factory=dict)
    norm: Mapping[str, Tensor] = field(default_factory=dict)
    lowrank: Mapping[str, LowRankFactors] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    identifier: str = ""
    token_grids: Mapping[str, Tensor] = field(default_factory=dict)
    mappers: Mapping[str, TokenMapper] = field(default_factory=dict)
    kv: Mapping[str, Tensor] = field(default_factory=dict)
    gated: Mapping[str, GatedEdit] = field(default_factory=dict)
    class_noun: str = ""
    encoder: EncoderChange = field(default_factory=EncoderChange)
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """Every placeholder word it teaches."""
        return tuple(dict.fromkeys((*self.tokens, *self.token_grids, *self.mappers, *self.gated)))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor."""
        for mapping in (self.spectral, self.norm, self.tokens, self.token_grids, self.kv, self.dense):
            yield from mapping.values()
        for mapping in (self.encoder.spectral, self.encoder.norm):
            yield from mapping.values()
        for factors in (*self.lowrank.values(), *self.encoder.lowrank.values()):
            yield from (factors.a, factors.b)
        for mapper in self.mappers.values():
            yield from (mapper.frequencies, mapper.output_weight, mapper.output_bias)
            for layer in mapper.layers:
                yield from (layer.weight, layer.bias, layer.norm_weight, layer.norm_bias)
        for edit in self.gated.values():
            yield from (edit.target, edit.dual, *edit.outputs.values())
