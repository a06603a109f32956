"""Adapters made of adapters, before any engine: weighted sums, interpolation and scaling, in fp32.

Shifts of singular values add as deltas; the relu comes where the row is made, so relu(sigma + d1 + d2) and
relu(sigma + (1 - t) d1 + t d2) of SVDiff (Han et al. 2023, section 3.4) both hold. Low-rank products add by joining
their ranks: sum_k w_k B_k A_k = [w_1 B_1 ... w_n B_n] [A_1; ...; A_n].
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, LowRankFactors
from hueshift.adapters.errors import InvalidArgument, Reason

MIXED_METHOD = "mix"
Parts = Sequence[tuple[Adapter, float]]


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Return the adapter with its change of the UNet times `factor`.

    Learned words keep their embeddings: those are places, not changes. Raises InvalidArgument on a factor that is not
    finite.
    """
    _check_weight(factor, "factor")
    return replace(
        adapter,
        spectral={layer: shift.float() * factor for layer, shift in adapter.spectral.items()},
        norm={layer: shift.float() * factor for layer, shift in adapter.norm.items()},
        lowrank={layer: replace(part, scale=part.scale * factor) for layer, part in adapter.lowrank.items()},
    )


def add(parts: Parts) -> Adapter:
    """Return the weighted sum of adapters of one base model and kind.

    Raises InvalidArgument (INVALID_FIELD) without parts or on a weight that is not finite, (ADAPTERS_INCOMPATIBLE) when
    base models or kinds differ, or when two adapters teach the same word differently.
    """
    _check_parts(parts)
    first = parts[0][0]
    return Adapter(
        kind=first.kind,
        base_hash=first.base_hash,
        method=_common((a.method for a, _ in parts), MIXED_METHOD),
        spectral=_add_shifts([(a.spectral, weight) for a, weight in parts]),
        norm=_add_shifts([(a.norm, weight) for a, weight in parts]),
        lowrank=_join_factors(parts),
        tokens=_merge_words(parts, _same_word),
        identifier=_common((a.identifier for a, _ in parts), ""),
    )


def interpolate(first: Adapter, second: Adapter, position: float) -> Adapter:
    """Return the adapter between two: `first` itself at 0, `second` itself at 1, both weighted in between.

    A word that both teach moves from one embedding to the other. Raises InvalidArgument as `add`, and on a position
    outside of 0 to 1.
    """
    if not 0 <= position <= 1:
        raise InvalidArgument.for_field("position", f"{position} given; allowed: 0 to 1")
    parts = [(first, 1 - position), (second, position)]
    _check_parts(parts)
    if position in (0, 1):
        return second if position else first

    def between(_word: str, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise _incompatible(f"a word has {a.shape[0]} vectors in one and {b.shape[0]} in the other")
        return torch.lerp(a.float(), b.float(), position)

    return replace(add([(replace(a, tokens={}), weight) for a, weight in parts]), tokens=_merge_words(parts, between))


def _check_parts(parts: Parts) -> None:
    if not parts:
        raise InvalidArgument.for_field("adapters", "none given; allowed: one or more")
    for adapter, weight in parts:
        _check_weight(weight, "weight")
        if adapter.base_hash != parts[0][0].base_hash:
            raise _incompatible(f"they belong to base models {parts[0][0].base_hash} and {adapter.base_hash}")
        if adapter.kind != parts[0][0].kind:
            raise _incompatible(f"they are of kinds {parts[0][0].kind} and {adapter.kind}")


def _check_weight(weight: float, field: str) -> None:
    if not math.isfinite(weight):
        raise InvalidArgument.for_field(field, f"{weight} given; allowed: a finite number")


def _incompatible(why: str) -> InvalidArgument:
    return InvalidArgument(Reason.ADAPTERS_INCOMPATIBLE, f"the adapters cannot be combined: {why}")


def _common(values: Iterable[str], otherwise: str) -> str:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else otherwise


def _add_shifts(parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for shifts, weight in parts:
        for layer, shift in shifts.items():
            if layer in total and total[layer].shape != shift.shape:
                raise _incompatible(
                    f"layer {layer!r} has {len(total[layer])} shifts in one and {len(shift)} in another"
                )
            added = shift.float() * weight
            total[layer] = total[layer] + added if layer in total else added
    return total


def _join_factors(parts: Parts) -> dict[str, LowRankFactors]:
    joined: dict[str, LowRankFactors] = {}
    for adapter, weight in parts:
        for layer, part in adapter.lowrank.items():
            a, b = part.a.float(), part.b.float() * (weight * part.scale)
            before = joined.get(layer)
            if before is not None:
                if before.a.shape[1] != a.shape[1] or before.b.shape[0] != b.shape[0]:
                    raise _incompatible(f"layer {layer!r} has factors of different widths")
                a, b = torch.cat([before.a, a]), torch.cat([before.b, b], dim=1)
            joined[layer] = LowRankFactors(a, b)
    return joined


def _merge_words(parts: Parts, choose: Callable[[str, Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    words: dict[str, Tensor] = {}
    for adapter, _ in parts:
        for word, vectors in adapter.tokens.items():
            words[word] = choose(word, words[word], vectors) if word in words else vectors
    return words


def _same_word(word: str, a: Tensor, b: Tensor) -> Tensor:
    if not torch.equal(a, b):
        raise _incompatible(f"both teach the word {word!r}, differently; train one of them with another identifier")
    return a
