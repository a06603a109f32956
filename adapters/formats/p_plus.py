"""P+ (Voynov et al. 2023) as prompt-plus-pytorch by mkshing names it: `<word>-0`, `<word>-1` and on, each [width].

The paper gives every cross-attention layer an embedding. That program makes as many, but its UNet steps through them
once per block: 7 of 16 are used with Stable Diffusion 1.x, in the order of the blocks, and the others keep the value
they began with. Files are read as the program that wrote them draws: by blocks if all embeddings past the last block
are equal, by layers otherwise. The program writes pickles; the same names in a safetensors file are read here.
"""

import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.formats.detect import numbered_words
from hueshift.adapters.formats.draft import Draft
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import word_of

BY_BLOCKS = (
    "all embeddings past the {used} blocks with cross-attention are equal, so this file was trained with one embedding "
    "per block; all layers of a block take its embedding"
)


def read(draft: Draft, source: ForeignFile) -> None:
    """Add every word with its embeddings [1, layers, 1, width].

    Raises FailedPrecondition (ADAPTER_BASE_MISMATCH) unless there are as many as the base model has cross-attentions.
    """
    words = numbered_words(source.entries)
    attentions = draft.base.layout.cross_attentions
    for stored, keys in words.items():
        if len(keys) != len(attentions):
            raise FailedPrecondition(
                Reason.ADAPTER_BASE_MISMATCH,
                f"adapter file refused: the word {stored!r} has embeddings for {len(keys)} layers, but this base model "
                f"has {len(attentions)} cross-attention layers; it was made for another base model",
            )
        word = word_of(stored, draft, source) if len(words) == 1 else stored
        draft.add_grid(word, _by_layer(_vectors(draft, source, keys), draft)[None, :, None], keys[0])


def _vectors(draft: Draft, source: ForeignFile, keys: list[str]) -> Tensor:
    width = draft.base.layout.token_width
    rows = []
    for key in keys:
        shape = source.entries[key].shape
        if shape not in ((width,), (1, width)):
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensor {key!r} has shape {list(shape)}; allowed: [{width}], the width of this "
                "base model's text encoder",
            )
        rows.append(source.read(key).flatten())
    if len({row.dtype for row in rows}) > 1:
        rows = [row.float() for row in rows]
    return torch.stack(rows)


def _by_layer(vectors: Tensor, draft: Draft) -> Tensor:
    """Return the embedding of every layer [layers, width]."""
    blocks = [name.partition(".attentions.")[0] for name in draft.base.layout.cross_attentions]
    order = list(dict.fromkeys(blocks))
    unused = vectors[len(order) :]
    # A single one past the blocks is equal to itself, which tells nothing.
    if len(unused) < 2 or not bool((unused == unused[0]).all()):
        return vectors
    draft.notes.append(BY_BLOCKS.format(used=len(order)))
    return vectors[[order.index(block) for block in blocks]]
