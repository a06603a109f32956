"""Laws of combining adapters: exact ends, sums in any order, weights by block; and words, which only pass through."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adapters import BASE_HASH, LAYOUT, lowrank_adapter, spectral_adapter
from text_side_adapters import gated, kv_deltas, layer_tokens, mapper, multi_vector
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.algebra import Parts, add, interpolate, mix_blocks, scale
from hueshift.adapters.blocks import BlockWeights, Weight, layer_weight
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.adapters.validate import FileLimits

CROSS = BaseLayout(
    BASE_HASH,
    tuple(
        MatrixLayer(f"{block}.attentions.0.attn2.{side}", (5, 4))
        for block in ("down_blocks.0", "up_blocks.1")
        for side in ("to_k", "to_v")
    ),
    (),
    token_width=4,
)
DOWN = BlockWeights((("down", 1.0),))
WEIGHTS: st.SearchStrategy[Weight] = st.one_of(
    st.floats(-2, 2, width=32),
    st.builds(
        lambda down, up: BlockWeights((("down", down), ("up", up))),
        st.floats(-2, 2, width=32),
        st.floats(-2, 2, width=32),
    ),
)


def change(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter changes, as fp64 tensors by part and layer."""
    found = {f"spectral/{layer}": shift.double() for layer, shift in adapter.spectral.items()}
    found |= {f"norm/{layer}": shift.double() for layer, shift in adapter.norm.items()}
    found |= {f"kv/{layer}": delta.double() for layer, delta in adapter.kv.items()}
    found |= {f"low/{layer}": part.scale * part.b.double() @ part.a.double() for layer, part in adapter.lowrank.items()}
    return found


def weighted(parts: Parts) -> dict[str, Tensor]:
    """The sum that `add` should give, layer by layer, in fp64."""
    total: dict[str, Tensor] = {}
    for adapter, weight in parts:
        for name, tensor in change(adapter).items():
            term = layer_weight(weight, name.split("/")[1]) * tensor
            total[name] = total[name] + term if name in total else term
    return total


def assert_changes(adapter: Adapter, expected: dict[str, Tensor]) -> None:
    found = change(adapter)
    assert found.keys() <= expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(tensor)), tensor, rtol=1e-5, atol=1e-5)


def wordless(seed: int, kind: str) -> Adapter:
    return spectral_adapter(seed, "") if kind == "spectral" else lowrank_adapter(seed, 1 + seed % 3)


@settings(deadline=None)
@given(st.sampled_from(("spectral", "lowrank")), st.lists(WEIGHTS, min_size=1, max_size=4))
def test_sums_are_weighted_layer_by_layer_in_any_order(kind: str, weights: list[Weight]) -> None:
    parts = [(wordless(seed, kind), weight) for seed, weight in enumerate(weights)]
    if all(weight == 0 for weight in weights):
        with pytest.raises(InvalidArgument, match="0 for every adapter"):
            add(parts)
        return
    expected = weighted(parts)
    assert_changes(add(parts), expected)
    assert_changes(add(parts[::-1]), expected)


@settings(deadline=None)
@given(st.sampled_from(("spectral", "lowrank")), st.floats(0, 1))
def test_interpolation_moves_from_one_to_the_other(kind: str, position: float) -> None:
    first, second = wordless(0, kind), wordless(1, kind)
    assert_changes(interpolate(first, second, position), weighted([(first, 1 - position), (second, position)]))
    assert interpolate(first, second, 0) is first
    assert interpolate(first, second, 1) is second


@settings(deadline=None)
@given(st.sampled_from(("spectral", "lowrank")), WEIGHTS)
def test_block_mixes_take_the_rest_from_the_other(kind: str, weight: Weight) -> None:
    first, second = wordless(0, kind), wordless(1, kind)
    rest = {name: 1 - layer_weight(weight, name.split("/")[1]) for name in {**change(first), **change(second)}}
    mixed = mix_blocks(first, second, weight)
    expected = weighted([(first, weight)])
    for name, tensor in change(second).items():
        term = rest[name] * tensor
        expected[name] = expected[name] + term if name in expected else term
    assert_changes(mixed, expected)


def test_block_mixes_are_exact_where_one_adapter_is_alone() -> None:
    first, second = spectral_adapter(0), replace(spectral_adapter(1, "ink"), identifier="ink")
    mixed = mix_blocks(first, second, DOWN)
    assert mixed.spectral.keys() == {"down.conv", "up.to_q"}
    for layer, owner in (("down.conv", first), ("up.to_q", second)):
        assert mixed.spectral[layer].dtype == owner.spectral[layer].dtype
        assert torch.equal(mixed.spectral[layer], owner.spectral[layer])
    assert mixed.norm["up.norm"] is second.norm["up.norm"]
    assert mixed.tokens.keys() == {"sks", "ink"}
    assert mixed.identifier == ""
    assert mix_blocks(first, second, 1.0) is first
    assert mix_blocks(first, second, 0.0) is second


def test_hand_computed_values() -> None:
    one = Adapter(AdapterKind.SPECTRAL, BASE_HASH, "svdiff", spectral={"down.conv": torch.tensor([1.0, -2, 0, 0, 0])})
    two = replace(one, spectral={"down.conv": torch.tensor([4.0, 4, 0, 0, 8])})
    assert add([(one, 0.5), (two, -0.25)]).spectral["down.conv"].tolist() == [-0.5, -2, 0, 0, -2]
    assert interpolate(one, two, 0.75).spectral["down.conv"].tolist() == [3.25, 2.5, 0, 0, 6]
    assert mix_blocks(one, two, BlockWeights((("down", 0.25),))).spectral["down.conv"].tolist() == [3.25, 2.5, 0, 0, 6]


def test_ranks_are_kept_alone_and_bounded_together() -> None:
    one, two = lowrank_adapter(0, rank=60), lowrank_adapter(1, rank=69)
    alone = add([(one, BlockWeights((("down", 0.5),)))])
    assert alone.lowrank.keys() == {"down.proj_out"}
    assert alone.lowrank["down.proj_out"].scale == 0.5 * one.lowrank["down.proj_out"].scale
    assert alone.lowrank["down.proj_out"].b is one.lowrank["down.proj_out"].b
    with pytest.raises(InvalidArgument, match=r"rank 129, .* at most 128") as caught:
        add([(one, 1.0), (two, 1.0)])
    assert caught.value.reason is Reason.ADAPTER_RANK_TOO_LARGE
    assert caught.value.metadata == {"layer": "down.proj_out", "rank": "129", "max_rank": "128"}
    # No rank is taken where only one of them acts.
    mix_blocks(one, two, DOWN)
    with pytest.raises(InvalidArgument, match="at most 100"):
        add([(one, 1.0), (two, 1.0)], max_rank=100)


def test_key_and_value_deltas_add_beside_other_kinds() -> None:
    one, two = kv_deltas(CROSS, seed=0), kv_deltas(CROSS, "<new2>", seed=5)
    parts: Parts = [(one, 0.5), (two, BlockWeights((("up_blocks.1", -1.0),)))]
    total = add(parts)
    assert_changes(total, weighted(parts))
    assert total.tokens.keys() == {"<new1>", "<new2>"}
    assert scale(one, 2.0).kv.keys() == one.kv.keys()
    for kind in (AdapterKind.SPECTRAL, AdapterKind.LOWRANK):
        other = Adapter(kind, BASE_HASH, "x")
        assert add([(one, 1.0), (other, 1.0)]).kind is kind
    assert add([(one, 1.0), (multi_vector(CROSS), 1.0)]).kind is AdapterKind.KV
    read_adapter(write_adapter(total), CROSS, FileLimits())


def test_words_join_and_do_not_collide() -> None:
    grid, plain = layer_tokens(CROSS, "w"), multi_vector(CROSS, "v")
    both = add([(grid, 0.5), (plain, 1.0)])
    assert both.words == ("v", "w")
    assert both.token_grids["w"] is grid.token_grids["w"]
    same = add([(grid, 1.0), (layer_tokens(CROSS, "w"), 1.0)])
    assert same.words == ("w",)
    for other in (layer_tokens(CROSS, "w", seed=1), multi_vector(CROSS, "w"), mapper(CROSS, "w")):
        with pytest.raises(InvalidArgument, match="'w', differently") as caught:
            add([(grid, 1.0), (other, 1.0)])
        assert caught.value.reason is Reason.ADAPTERS_INCOMPATIBLE
    # Absent by its weight, so there is nothing to collide with.
    assert add([(grid, 1.0), (multi_vector(CROSS, "w"), 0.0)]) is grid


def test_embeddings_interpolate_if_they_have_one_shape() -> None:
    one, two = layer_tokens(CROSS, "w"), layer_tokens(CROSS, "w", seed=1)
    expected = 0.75 * one.token_grids["w"] + 0.25 * two.token_grids["w"]
    torch.testing.assert_close(interpolate(one, two, 0.25).token_grids["w"], expected)
    with pytest.raises(InvalidArgument, match="'w' has embeddings of"):
        interpolate(one, layer_tokens(CROSS, "w", vectors=2), 0.5)


@pytest.mark.parametrize("make", [mapper, gated], ids=["mapper", "gated"])
def test_networks_and_gated_edits_only_pass_through(make: Callable[..., Adapter]) -> None:
    one = make(CROSS, "w")
    beside = add([(one, 1.0), (kv_deltas(CROSS), 0.5)])
    assert (beside.mappers, beside.gated) == (one.mappers, one.gated)
    assert add([(one, 1.0), (make(CROSS, "w"), 1.0)]).words == ("w",)
    for weight in (0.5, -1.0, BlockWeights((("up_blocks.1", 1.0),))):
        with pytest.raises(InvalidArgument, match="only passes through") as caught:
            add([(one, weight), (kv_deltas(CROSS), 1.0)])
        assert caught.value.reason is Reason.ADAPTERS_INCOMPATIBLE
    with pytest.raises(InvalidArgument, match="only passes through"):
        scale(one, 0.5)
    with pytest.raises(InvalidArgument, match="'w', differently"):
        add([(one, 1.0), (make(CROSS, "w", seed=3), 1.0)])
    with pytest.raises(InvalidArgument, match="allowed: the ends"):
        interpolate(one, kv_deltas(CROSS), 0.5)
    assert interpolate(one, kv_deltas(CROSS), 0) is one
    shared = interpolate(one, replace(make(CROSS, "w"), class_noun="cat"), 0.5)
    assert (shared.words, shared.class_noun) == (("w",), "")


def test_spectral_and_low_rank_only_meet_in_requests() -> None:
    with pytest.raises(InvalidArgument, match="in a request instead"):
        add([(spectral_adapter(), 1.0), (lowrank_adapter(), 1.0)])
    with pytest.raises(InvalidArgument, match="finite"):
        add([(spectral_adapter(), BlockWeights((("up", float("nan")),)))])


def test_combinations_are_files_like_any_other() -> None:
    mixed = mix_blocks(lowrank_adapter(0), lowrank_adapter(1, 3), DOWN)
    read = read_adapter(write_adapter(mixed), LAYOUT, FileLimits())
    assert_changes(read, change(mixed))
