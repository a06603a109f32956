"""Learned words that lie beside other parts of a file, in whatever way their programs name them."""

import re

from hueshift.adapters.errors import InvalidArgument
from hueshift.adapters.formats.draft import Draft
from hueshift.adapters.formats.source import ForeignFile

BUNDLED = re.compile(r"bundle_emb\.(.+)\.(?:string_to_param\.\*|emb_params)")
_BRACKETS = re.compile(r"<[^<>]+>")
_BY_NAME = re.compile(r"string_to_param\.(.+)")
# A1111 has no word in the tensor's name; the first Textual Inversion program, and those made from it, say `*`.
_NAMELESS = ("emb_params", "*")
# cloneofsimo marks its words so in the metadata.
_EMBEDDING = "<embed>"


def take_words(draft: Draft, source: ForeignFile) -> list[str]:
    """Add every tensor that is marked as a learned word: `<word>`, `bundle_emb.word...`, or by the metadata.

    Returns the words.
    """
    taken: list[str] = []
    for key in source.leftover:
        bundled = BUNDLED.fullmatch(key)
        named = _BY_NAME.fullmatch(key)
        if bundled:
            word = bundled[1]
        elif named:
            word = word_of(named[1], draft, source)
        elif _BRACKETS.fullmatch(key) or source.metadata.get(key) == _EMBEDDING:
            word = key
        else:
            continue
        draft.add_word(word, source.read(key), key)
        taken.append(word)
    return taken


def bare_word(key: str) -> str:
    """Return a tensor's name without what programs put around a word."""
    found = BUNDLED.fullmatch(key) or _BY_NAME.fullmatch(key)
    return found[1] if found else key


def word_of(stored: str, draft: Draft, source: ForeignFile) -> str:
    """Return the word for what the file calls `stored`, the only one of its kind there.

    The caller's choice counts most. Raises InvalidArgument (INVALID_FIELD) if neither says a word.
    """
    if draft.options.word:
        return draft.options.word
    name = source.metadata.get("name", "") if stored in _NAMELESS else stored
    if not name:
        raise InvalidArgument.for_field(
            "word", f"the learned embedding {stored!r} has no word in its file; give the word that shall stand for it"
        )
    return name
