"""Mixes: which adapters with which weights make one engine row, in a form in which equal mixes are equal."""

from collections.abc import Iterable
from operator import itemgetter

from hueshift.adapters.blocks import Weight, add_weights

Mix = tuple[tuple[str, Weight], ...]
"""Content hashes of adapters with their weights, sorted, each hash once. The empty mix is the base model."""


def make_mix(adapters: Iterable[tuple[str, Weight]]) -> Mix:
    """Return the canonical mix of (content hash, weight): sorted, equal hashes added up, zero weights left out.

    Weights by block are canonical when they come from `resolve_blocks`, so that equal mixes share a slot.
    """
    weights: dict[str, Weight] = {}
    for content_hash, weight in adapters:
        weights[content_hash] = add_weights(weights.get(content_hash, 0.0), weight)
    return tuple((key, weight) for key, weight in sorted(weights.items(), key=itemgetter(0)) if weight != 0)
