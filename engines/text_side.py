"""What a mix of adapters teaches the text side: words, edits of cross-attention keys and values, and of encoders."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hueshift.adapters import word_algebra
from hueshift.adapters.adapter import Adapter, GatedEdit, TokenMapper
from hueshift.adapters.blocks import Weight, layer_weight
from hueshift.adapters.layout import is_text_side as is_text_side
from hueshift.engines.cross_attention import CrossEdits
from hueshift.engines.encoder_weights import EncoderEdits, compose_encoder
from hueshift.engines.svd_cache import SpectralFactors

Word = Tensor | TokenMapper
"""A learned word: a grid [stages, layers, vectors, width] of embeddings, or a network that makes them."""


@dataclass(frozen=True, slots=True, eq=False)
class TextSide:
    """`words` by placeholder; `edits` of to_k and to_v; `encoder` has those of the text encoders."""

    words: Mapping[str, Word] = field(default_factory=dict)
    edits: CrossEdits = field(default_factory=CrossEdits)
    encoder: EncoderEdits = field(default_factory=EncoderEdits)

    @property
    def nbytes(self) -> int:
        """Bytes of the edits; words are small."""
        return self.edits.nbytes + self.encoder.nbytes


def compose_text_side(mix: Sequence[tuple[Adapter, Weight]], factors: SpectralFactors) -> TextSide:
    """Compose the text side of weighted adapters of one base.

    Words are used as they are, whatever the weight: they say what a word means, not how strongly. Edits scale with it.
    Raises InvalidArgument (ADAPTERS_INCOMPATIBLE) when two adapters learned the same word differently.
    """
    return TextSide(merge_words([adapter for adapter, _ in mix]), _compose_edits(mix, factors), compose_encoder(mix))


def merge_words(adapters: Sequence[Adapter]) -> dict[str, Word]:
    """Gather the learned words of several adapters.

    Raises InvalidArgument (ADAPTERS_INCOMPATIBLE) when two of them learned the same word differently.
    """
    words = word_algebra.merge_words(adapters)
    plain: dict[str, Word] = {word: vectors[None, None] for word, vectors in words.tokens.items()}
    return {**plain, **words.token_grids, **words.mappers}


def _compose_edits(mix: Sequence[tuple[Adapter, Weight]], factors: SpectralFactors) -> CrossEdits:
    shifts: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    stacked: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for adapter, weight in mix:
        for name, shift in adapter.spectral.items():
            if is_text_side(name):
                shifts[name] = shifts.get(name, torch.zeros(())) + layer_weight(weight, name) * shift.float()
        for name, delta in adapter.kv.items():
            scaled = layer_weight(weight, name) * delta.float()
            deltas[name] = deltas[name] + scaled if name in deltas else scaled
        for name, parts in adapter.lowrank.items():
            if is_text_side(name):
                a, b = stacked.setdefault(name, ([], []))
                a.append(parts.a.float())
                b.append(parts.b.float() * (layer_weight(weight, name) * parts.scale))
    return CrossEdits(
        shifts={name: (factors.sigma[name] + shift).relu() - factors.sigma[name] for name, shift in shifts.items()},
        branches={name: (torch.cat(a, 0), torch.cat(b, 1)) for name, (a, b) in stacked.items()},
        deltas=deltas,
        gated=_gather_gated(mix),
    )


def _gather_gated(mix: Sequence[tuple[Adapter, Weight]]) -> dict[str, tuple[tuple[GatedEdit, float], ...]]:
    found: dict[str, tuple[tuple[GatedEdit, float], ...]] = {}
    for name, edit, strength in _each_gated(mix):
        found[name] = (*found.get(name, ()), (edit, strength))
    return found


def _each_gated(mix: Sequence[tuple[Adapter, Weight]]) -> Iterator[tuple[str, GatedEdit, float]]:
    for adapter, weight in mix:
        for edit in adapter.gated.values():
            for name in edit.outputs:
                yield name, edit, layer_weight(weight, name)
