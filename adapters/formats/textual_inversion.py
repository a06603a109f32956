"""Learned words (Gal et al. 2022): `{word: vectors}` as diffusers writes it, or A1111's `emb_params` without a word.

A word of several vectors is one tensor [vectors, width] (diffusers, A1111), or `word`, `word_1`, `word_2`, as diffusers
calls its tokens. SDXL's words are two tensors, `clip_l` and `clip_g`, one for each text encoder: here they lie side by
side, and either form of file is read. A pair for prompt and negative prompt (DreamArtist, Dong et al. 2022) is two
words, `word` and `word-neg`.
"""

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.formats.detect import joined_words
from hueshift.adapters.formats.draft import NEGATIVE, Draft
from hueshift.adapters.formats.exports import BASE_HASH_KEY, Leftovers
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import bare_word, word_of
from hueshift.adapters.layout import BaseLayout
from hueshift.adapters.tensors import pack

_TWO_ENCODERS = ("clip_l", "clip_g")


def read(draft: Draft, source: ForeignFile) -> None:
    """Add every word. Raises InvalidArgument (INVALID_FIELD) if the file's only word has no name and none is given."""
    keys = list(source.entries)
    if any(key in _TWO_ENCODERS for key in keys):
        _read_two(draft, source, keys)
        return
    words = joined_words(keys)
    if len(words) > draft.limits.max_words:
        raise InvalidArgument(
            Reason.ADAPTER_FILE_INVALID,
            f"adapter file refused: it teaches {len(words)} words; allowed: at most {draft.limits.max_words}",
        )
    names = _names(list(words), draft, source)
    for key, parts in words.items():
        vectors = [source.read(part) for part in parts]
        if len(vectors) > 1 and any(tensor.numel() != tensor.shape[-1] for tensor in vectors):
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensors {parts[0]!r} to {parts[-1]!r} are one word, so each must be one vector",
            )
        whole = vectors[0] if len(vectors) == 1 else _rows(vectors, parts)
        draft.add_word(names[key], whole, key)


def write(adapter: Adapter, layout: BaseLayout, left: Leftovers) -> bytes:
    """Write the learned words, each as one tensor [vectors, width]: diffusers reads a file of one word."""
    left.refuse("spectral shifts", adapter.spectral)
    left.refuse("low-rank parts", adapter.lowrank)
    left.refuse("shifts of norms", adapter.norm)
    tensors: dict[str, Tensor] = dict(adapter.tokens)
    if layout.token_parts and len(tensors) == 1:
        # As diffusers and others read SDXL's words; the word itself is their caller's to say.
        (word, vectors), *_ = tensors.items()
        halves = vectors.split_with_sizes(list(layout.token_parts), 1)
        tensors = {name: half.contiguous() for name, half in zip(_TWO_ENCODERS, halves, strict=True)}
        return pack(tensors, {"format": "pt", "name": word, BASE_HASH_KEY: adapter.base_hash})
    return pack(tensors, {"format": "pt", BASE_HASH_KEY: adapter.base_hash})


def _read_two(draft: Draft, source: ForeignFile, keys: list[str]) -> None:
    widths = draft.base.layout.token_parts
    if len(widths) != len(_TWO_ENCODERS):
        raise FailedPrecondition(
            Reason.ADAPTER_BASE_MISMATCH,
            f"the word of this file has vectors for two text encoders ({', '.join(keys)[:80]}), as SDXL has them; this "
            "server's base model has one",
        )
    shapes = {key: source.entries[key].shape for key in keys}
    counts = {shape[0] if len(shape) == 2 else 1 for shape in shapes.values()}
    ends = {key: shape[-1] if shape else 0 for key, shape in shapes.items()}
    if ends != dict(zip(_TWO_ENCODERS, widths, strict=True)) or len(counts) != 1:
        wanted = " and ".join(f"{key} [vectors, {width}]" for key, width in zip(_TWO_ENCODERS, widths, strict=True))
        raise InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH,
            f"adapter file refused: a word of this base model is {wanted} of as many vectors; the file has "
            + ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items()),
        )
    halves = [source.read(key).reshape(-1, ends[key]) for key in _TWO_ENCODERS]
    if len({half.dtype for half in halves}) > 1:
        halves = [half.float() for half in halves]
    draft.add_word(word_of("*", draft, source), torch.cat(halves, 1), _TWO_ENCODERS[0])


def _rows(vectors: list[Tensor], parts: list[str]) -> Tensor:
    if len({(tensor.shape[-1], tensor.dtype) for tensor in vectors}) > 1:
        raise InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH,
            f"adapter file refused: tensors {parts[0]!r} to {parts[-1]!r} are one word, but differ in width or dtype",
        )
    return torch.stack([tensor.flatten() for tensor in vectors])


def _names(keys: list[str], draft: Draft, source: ForeignFile) -> dict[str, str]:
    """What stands for each tensor: the caller's word for a single one or a pair, else what the file says."""
    bare = {key: bare_word(key) for key in keys}
    if len(keys) == 1:
        return {keys[0]: word_of(bare[keys[0]], draft, source)}
    first, second = keys[0], keys[-1]
    if draft.options.word and len(keys) == 2 and bare[second] == bare[first] + NEGATIVE:
        return {first: draft.options.word, second: draft.options.word + NEGATIVE}
    return bare
