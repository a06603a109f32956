"""Adapters made of adapters, before any engine: weighted sums, interpolation, mixing by block, scaling.

Shifts of singular values add as deltas; the relu comes where the row is made, so relu(sigma + d1 + d2) and
relu(sigma + (1 - t) d1 + t d2) of SVDiff (Han et al. 2023, section 3.4) both hold, in the UNet and in the text encoder.
Deltas of keys and values add too, and so do full deltas, beside which spectral and low-rank parts stay what they are.
Low-rank products add by joining their ranks: sum_k w_k B_k A_k = [w_1 B_1 ... w_n B_n] [A_1; ...; A_n]. Sums are made
in fp64 and kept in fp32, those of full deltas in fp16 where all of them are; what only one adapter brings with weight 1
keeps its own values and dtype.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TypeAlias

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, EncoderChange, LowRankFactors
from hueshift.adapters.blocks import BlockWeights, Weight, complement, layer_weight
from hueshift.adapters.dense_deltas import DENSE_DTYPE, store_delta
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.validate import FileLimits
from hueshift.adapters.word_algebra import (
    Words,
    check_passes_through,
    incompatible,
    lerp_words,
    merge_words,
)

MIXED_METHOD = "mix"
# Files of the later kinds hold the parts of the earlier ones too; spectral and low-rank ones exclude each other.
_PRECEDENCE = (AdapterKind.TOKENS, AdapterKind.KV, AdapterKind.SPECTRAL, AdapterKind.LOWRANK, AdapterKind.DENSE)
Parts = Sequence[tuple[Adapter, Weight]]
_Shifts = Callable[[Adapter], Mapping[str, Tensor]]
_Lowrank: TypeAlias = Mapping[str, LowRankFactors]
_Terms: TypeAlias = Sequence[tuple[Tensor, float]]


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Return the adapter with its change of the UNet and the text encoder times `factor`.

    Learned words keep their embeddings: those are places, not changes. Raises InvalidArgument (INVALID_FIELD) on a
    factor that is not finite, (ADAPTERS_INCOMPATIBLE) on one other than 1 for networks and gated edits.
    """
    _check_weight(factor, "factor")
    check_passes_through(adapter, factor)
    encoder = adapter.encoder
    return replace(
        adapter,
        spectral=_scaled(adapter.spectral, factor),
        norm=_scaled(adapter.norm, factor),
        lowrank=_scaled_factors(adapter.lowrank, factor),
        kv=_scaled(adapter.kv, factor),
        dense={layer: _sum_deltas(layer, [(delta, factor)]) for layer, delta in adapter.dense.items()},
        encoder=EncoderChange(
            _scaled(encoder.spectral, factor), _scaled(encoder.norm, factor), _scaled_factors(encoder.lowrank, factor)
        ),
    )


def add(parts: Parts, max_rank: int | None = None) -> Adapter:
    """Return the weighted sum of adapters of one base model; weights may differ by block.

    An adapter of weight 0 counts as absent, words included, and one of weight 1 alone is returned itself. Words and
    deltas of keys and values go beside any kind. `max_rank` is by default what a file may hold.

    Raises InvalidArgument (INVALID_FIELD) without parts, when all weights are 0 or one is not finite,
    (ADAPTERS_INCOMPATIBLE) when base models differ, spectral and low-rank adapters meet, two teach the same word
    differently, or a network or gated edit has a weight other than 1, (ADAPTER_RANK_TOO_LARGE) for joined ranks above
    `max_rank`.
    """
    _check_parts(parts)
    present = [(adapter, weight) for adapter, weight in parts if weight != 0]
    if not present:
        raise InvalidArgument.for_field("weight", "0 for every adapter; give one of them a weight other than 0")
    if len(present) == 1 and present[0][1] == 1:
        return present[0][0]
    for adapter, weight in present:
        check_passes_through(adapter, weight)
    return _with_words(_add_changes(present, max_rank), merge_words([adapter for adapter, _ in present]))


def interpolate(first: Adapter, second: Adapter, position: float, max_rank: int | None = None) -> Adapter:
    """Return the adapter between two: `first` itself at 0, `second` itself at 1, both weighted in between.

    A word that both teach moves from one embedding to the other. Raises InvalidArgument as `add`, and on a position
    outside of 0 to 1; networks and gated edits must be the same in both.
    """
    if not 0 <= position <= 1:
        raise InvalidArgument.for_field("position", f"{position} given; allowed: 0 to 1")
    parts = [(first, 1 - position), (second, position)]
    _check_parts(parts)
    if position in (0, 1):
        return second if position else first
    return _with_words(_add_changes(parts, max_rank), lerp_words(first, second, position))


def mix_blocks(first: Adapter, second: Adapter, weight: Weight, max_rank: int | None = None) -> Adapter:
    """Return `first` times `weight` plus `second` times 1 - `weight`, block by block, with the words of both.

    With weight 1 in the structure blocks and 0 elsewhere this is SVDiff's style mixing: structure of the
    first, appearance of the second. It is `first` itself where the weight is 1 everywhere, `second` itself where it is
    0. Raises InvalidArgument as `add`.
    """
    return add([(first, weight), (second, complement(weight))], max_rank)


def _scaled(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {layer: tensor.float() * factor for layer, tensor in tensors.items()}


def _scaled_factors(lowrank: _Lowrank, factor: float) -> dict[str, LowRankFactors]:
    return {layer: replace(part, scale=part.scale * factor) for layer, part in lowrank.items()}


def _check_parts(parts: Parts) -> None:
    if not parts:
        raise InvalidArgument.for_field("adapters", "none given; allowed: one or more")
    kinds: list[AdapterKind] = []
    for adapter, weight in parts:
        for value in (weight,) if not isinstance(weight, BlockWeights) else (w for _, w in weight.entries):
            _check_weight(value, "weight")
        if adapter.base_hash != parts[0][0].base_hash:
            raise incompatible(f"they belong to base models {parts[0][0].base_hash} and {adapter.base_hash}")
        kinds.append(adapter.kind)
    if {AdapterKind.SPECTRAL, AdapterKind.LOWRANK} <= set(kinds) and AdapterKind.DENSE not in kinds:
        raise incompatible(
            f"they are of kinds {AdapterKind.SPECTRAL} and {AdapterKind.LOWRANK}, which no file holds together; name "
            "them both in a request instead"
        )


def _check_weight(weight: float, field: str) -> None:
    if not math.isfinite(weight):
        raise InvalidArgument.for_field(field, f"{weight} given; allowed: a finite number")


def _add_changes(parts: Parts, max_rank: int | None) -> Adapter:
    most = FileLimits().max_rank if max_rank is None else max_rank
    return Adapter(
        kind=max((adapter.kind for adapter, _ in parts), key=_PRECEDENCE.index),
        base_hash=parts[0][0].base_hash,
        method=_common((a.method for a, _ in parts), MIXED_METHOD),
        spectral=_add_tensors(parts, lambda adapter: adapter.spectral),
        norm=_add_tensors(parts, lambda adapter: adapter.norm),
        lowrank=_join_factors(parts, lambda adapter: adapter.lowrank, most),
        kv=_add_tensors(parts, lambda adapter: adapter.kv),
        dense=_add_tensors(parts, lambda adapter: adapter.dense, _sum_deltas),
        identifier=_common((a.identifier for a, _ in parts), ""),
        class_noun=_common((a.class_noun for a, _ in parts), ""),
        encoder=EncoderChange(
            _add_tensors(parts, lambda adapter: adapter.encoder.spectral),
            _add_tensors(parts, lambda adapter: adapter.encoder.norm),
            _join_factors(parts, lambda adapter: adapter.encoder.lowrank, most),
        ),
    )


def _with_words(adapter: Adapter, words: Words) -> Adapter:
    return replace(adapter, **{part.name: getattr(words, part.name) for part in fields(words)})


def _common(values: Iterable[str], otherwise: str) -> str:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else otherwise


def _add_tensors(parts: Parts, of: _Shifts, add_up: Callable[[str, _Terms], Tensor] | None = None) -> dict[str, Tensor]:
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for adapter, weight in parts:
        for layer, tensor in of(adapter).items():
            strength = layer_weight(weight, layer)
            if strength != 0:
                found.setdefault(layer, []).append((tensor, strength))
    return {layer: (add_up or _sum)(layer, terms) for layer, terms in found.items()}


def _sum(layer: str, terms: _Terms) -> Tensor:
    first, weight = terms[0]
    return first if len(terms) == 1 and weight == 1 else _total(layer, terms).float()


def _sum_deltas(layer: str, terms: _Terms) -> Tensor:
    first, weight = terms[0]
    if len(terms) == 1 and weight == 1:
        return first
    total = _total(layer, terms)
    return store_delta(total) if all(tensor.dtype is DENSE_DTYPE for tensor, _ in terms) else total.float()


def _total(layer: str, terms: _Terms) -> Tensor:
    first = terms[0][0]
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor, strength in terms:
        if tensor.shape != first.shape:
            raise incompatible(
                f"layer {layer!r} has {' x '.join(map(str, first.shape))} shifts in one and "
                f"{' x '.join(map(str, tensor.shape))} in another"
            )
        total += tensor.double() * strength
    return total


def _join_factors(parts: Parts, of: Callable[[Adapter], _Lowrank], max_rank: int) -> dict[str, LowRankFactors]:
    found: dict[str, list[LowRankFactors]] = {}
    for adapter, weight in parts:
        for layer, part in of(adapter).items():
            strength = layer_weight(weight, layer)
            if strength != 0:
                found.setdefault(layer, []).append(replace(part, scale=part.scale * strength))
    return {layer: _join(layer, factors, max_rank) for layer, factors in found.items()}


def _join(layer: str, factors: Sequence[LowRankFactors], max_rank: int) -> LowRankFactors:
    rank = sum(part.rank for part in factors)
    if rank > max_rank:
        raise InvalidArgument(
            Reason.ADAPTER_RANK_TOO_LARGE,
            f"layer {layer!r} would have rank {rank}, the ranks of all adapters together; allowed: at most {max_rank}. "
            "Combine fewer adapters, or import them with smaller ranks first",
            metadata={"layer": layer, "rank": str(rank), "max_rank": str(max_rank)},
        )
    if len(factors) == 1:
        return factors[0]
    if len({(part.b.shape[0], part.a.shape[1]) for part in factors}) > 1:
        raise incompatible(f"layer {layer!r} has factors of different widths")
    return LowRankFactors(
        torch.cat([part.a.float() for part in factors]),
        torch.cat([(part.b.double() * part.scale).float() for part in factors], dim=1),
    )
