"""Learned words that lie beside other parts of a file, in whatever way their programs name them."""

import re

from hueshift.adapters.formats.draft import Draft
from hueshift.adapters.formats.source import ForeignFile

_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(?:string_to_param\.\*|emb_params)")
_BRACKETS = re.compile(r"<[^<>]+>")
# cloneofsimo marks its words so in the metadata.
_EMBEDDING = "<embed>"


def take_words(draft: Draft, source: ForeignFile) -> None:
    """Add every tensor that is marked as a learned word: `<word>`, `bundle_emb.word...`, or by the metadata."""
    for key in source.leftover:
        bundled = _BUNDLED.fullmatch(key)
        if bundled:
            draft.add_word(bundled[1], source.read(key), key)
        elif _BRACKETS.fullmatch(key) or source.metadata.get(key) == _EMBEDDING:
            draft.add_word(key, source.read(key), key)
