"""What becomes of learned words when adapters are combined: they are places in the text encoder's space, not changes.

A word has no strength, so weights leave it alone; only interpolation moves an embedding. Networks (NeTI) and gated
edits (Perfusion) are not linear in what they learned, so they only pass through as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, GatedEdit, TokenMapper
from hueshift.adapters.errors import InvalidArgument, Reason

Choose = Callable[[str, Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Words:
    """The learned words of an adapter, by the way they are taught, as in Adapter."""

    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    token_grids: Mapping[str, Tensor] = field(default_factory=dict)
    mappers: Mapping[str, TokenMapper] = field(default_factory=dict)
    gated: Mapping[str, GatedEdit] = field(default_factory=dict)


def words_of(adapter: Adapter) -> Words:
    """Return the words of an adapter."""
    return Words(adapter.tokens, adapter.token_grids, adapter.mappers, adapter.gated)


def merge_words(adapters: Sequence[Adapter]) -> Words:
    """Gather the words of several adapters.

    Raises InvalidArgument (ADAPTERS_INCOMPATIBLE) when two of them teach a word differently.
    """
    return _gather([words_of(adapter) for adapter in adapters], _same)


def lerp_words(first: Adapter, second: Adapter, position: float) -> Words:
    """Return the words between two adapters, for a position strictly inside of 0 to 1.

    An embedding that both teach moves from one to the other; one that only one of them teaches stays.
    Raises InvalidArgument (ADAPTERS_INCOMPATIBLE) for embeddings of different shapes, a word that is taught in two
    ways, and networks and gated edits that the two do not share: there is nothing between those.
    """

    def between(word: str, a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return _same(word, a, b)
        if a.shape != b.shape:
            raise incompatible(
                f"the word {word!r} has embeddings of {list(a.shape)} in one, {list(b.shape)} in the other"
            )
        return torch.lerp(a.float(), b.float(), position)

    for name in ("mappers", "gated"):
        alone = sorted(set(getattr(first, name)) ^ set(getattr(second, name)))
        if alone:
            raise incompatible(
                f"there is nothing between having the word {alone[0]!r} of a network or gated edit and not having it; "
                "allowed: the ends, 0 and 1"
            )
    return _gather([words_of(first), words_of(second)], between)


def check_passes_through(adapter: Adapter, weight: object) -> None:
    """Raise InvalidArgument (ADAPTERS_INCOMPATIBLE) if the adapter has words that no weight but 1 can be given to."""
    held = [*adapter.mappers, *adapter.gated]
    if held and weight != 1:
        raise incompatible(
            f"the word {held[0]!r} is taught by a network or a gated edit, which only passes through as it is; give "
            "its adapter the weight 1 in all blocks"
        )


def incompatible(why: str) -> InvalidArgument:
    """Build the error for adapters that do not go together."""
    return InvalidArgument(Reason.ADAPTERS_INCOMPATIBLE, f"the adapters cannot be combined: {why}")


def _gather(parts: Sequence[Words], choose: Choose) -> Words:
    found: dict[str, dict[str, Any]] = {name.name: {} for name in fields(Words)}
    taught: dict[str, str] = {}
    for part in parts:
        for name, words in found.items():
            for word, value in getattr(part, name).items():
                # A gated edit comes beside the embedding of its word.
                if name != "gated" and taught.setdefault(word, name) != name:
                    raise _collision(word)
                words[word] = choose(word, words[word], value) if word in words else value
    return Words(**found)


def _same(word: str, a: Any, b: Any) -> Any:
    one, other = list(_leaves(a)), list(_leaves(b))
    if len(one) != len(other) or not all(map(_equal, one, other)):
        raise _collision(word)
    return a


def _collision(word: str) -> InvalidArgument:
    return incompatible(f"both teach the word {word!r}, differently; train one of them with another identifier")


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors, numbers and layer names of a word, in a fixed order."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _leaves(getattr(value, part.name))
    else:
        yield value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.float(), other.float())
    return type(one) is type(other) and bool(one == other)
