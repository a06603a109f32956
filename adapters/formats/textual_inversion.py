"""Learned words (Gal et al. 2022): `{word: vectors}` as diffusers writes it, or A1111's `emb_params` without a word."""

from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.formats.draft import Draft
from hueshift.adapters.formats.exports import BASE_HASH_KEY, Leftovers
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.layout import BaseLayout
from hueshift.adapters.tensors import pack

_NAMELESS = "emb_params"
_TWO_ENCODERS = ("clip_l", "clip_g")


def read(draft: Draft, source: ForeignFile) -> None:
    """Add every word. Raises InvalidArgument (INVALID_FIELD) if the file's only word has no name and none is given."""
    keys = list(source.entries)
    if any(key in _TWO_ENCODERS for key in keys):
        raise FailedPrecondition(
            Reason.ADAPTER_BASE_MISMATCH,
            f"the word of this file has vectors for two text encoders ({', '.join(keys)[:80]}), as SDXL has them; this "
            "server's base model has one",
        )
    if len(keys) > draft.limits.max_words:
        raise InvalidArgument(
            Reason.ADAPTER_FILE_INVALID,
            f"adapter file refused: it teaches {len(keys)} words; allowed: at most {draft.limits.max_words}",
        )
    for key in keys:
        draft.add_word(_word_of(key, len(keys), draft, source), source.read(key), key)


def write(adapter: Adapter, layout: BaseLayout, left: Leftovers) -> bytes:
    """Write the learned words."""
    left.refuse("spectral shifts", adapter.spectral)
    left.refuse("low-rank parts", adapter.lowrank)
    left.refuse("shifts of norms", adapter.norm)
    tensors: dict[str, Tensor] = dict(adapter.tokens)
    return pack(tensors, {"format": "pt", BASE_HASH_KEY: adapter.base_hash})


def _word_of(key: str, count: int, draft: Draft, source: ForeignFile) -> str:
    if count == 1 and draft.options.word:
        return draft.options.word
    if key != _NAMELESS:
        return key
    name = source.metadata.get("name", "")
    if not name:
        raise InvalidArgument.for_field(
            "word", f"the learned embedding {key!r} has no word in its file; give the word that shall stand for it"
        )
    return name
