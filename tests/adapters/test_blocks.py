"""Weights by block: what names mean, one form for all that mean the same, and sums that hold for every layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hueshift.adapters.blocks import (
    MAX_BLOCKS,
    BlockWeights,
    Weight,
    add_weights,
    block_names,
    complement,
    layer_weight,
    resolve_blocks,
    scale_weight,
    structure_blocks,
)
from hueshift.adapters.errors import InvalidArgument
from hueshift.adapters.layout import BaseLayout, MatrixLayer, NormLayer

MATRICES = [
    "conv_in",
    *(f"down_blocks.{n}.{part}" for n in range(4) for part in ("resnets.0.conv1", "resnets.1.conv1")),
    "mid_block.attentions.0.proj_out",
    *(f"up_blocks.{n}.attentions.{k}.proj_out" for n in range(2) for k in range(2)),
]
NORMS = ["down_blocks.2.resnets.0.norm1", "up_blocks.10.norm"]
LAYERS = [*MATRICES, *NORMS]
LAYOUT = BaseLayout(
    "ab" * 32,
    tuple(MatrixLayer(name, (2, 2)) for name in MATRICES),
    tuple(NormLayer(name, 2) for name in NORMS),
    token_width=4,
)
PREFIXES = sorted({".".join(name.split(".")[:n]) for name in LAYERS for n in range(1, 5)})
NUMBERS = st.sampled_from((-1.0, 0.0, 0.5, 1.0, 2.0))
GIVEN = st.dictionaries(st.sampled_from((*PREFIXES, "structure", "appearance")), NUMBERS, max_size=6)


def table(weight: Weight) -> dict[str, float]:
    return {name: layer_weight(weight, name) for name in LAYERS}


def test_the_presets_name_all_layers() -> None:
    assert structure_blocks(LAYOUT) == ("down_blocks.2", "down_blocks.3")
    assert block_names(LAYOUT)[:3] == ("conv_in", "down_blocks.0", "down_blocks.1")
    weights = table(resolve_blocks({"structure": 1, "appearance": -0.5}, LAYOUT))
    for name, weight in weights.items():
        assert weight == (1 if name.startswith(("down_blocks.2.", "down_blocks.3.")) else -0.5), name
    assert resolve_blocks({"structure": 1, "appearance": 1}, LAYOUT) == 1.0


def test_names_are_prefixes_up_to_a_dot_and_the_longest_counts() -> None:
    weights = table(resolve_blocks({"up_blocks.1": 1, "up_blocks.1.attentions.0": 2}, LAYOUT))
    changed = {name: weight for name, weight in weights.items() if weight}
    # up_blocks.10 begins with the letters of up_blocks.1, but is another block.
    assert changed == {"up_blocks.1.attentions.0.proj_out": 2, "up_blocks.1.attentions.1.proj_out": 1}


def test_a_block_wins_over_a_preset_however_short_its_name() -> None:
    assert resolve_blocks({"structure": 1, "down_blocks": 0}, LAYOUT) == 0.0
    weights = table(resolve_blocks({"appearance": 1, "mid_block": 0.5}, LAYOUT))
    assert (weights["mid_block.attentions.0.proj_out"], weights["conv_in"]) == (0.5, 1)
    assert weights["down_blocks.3.resnets.0.conv1"] == 0


def test_names_of_no_layer_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve_blocks({"mid": 1, "": 1, "mid_block": 1, "down_blocks.2.": 1}, LAYOUT, "blocks")
    fields = {violation.field: violation.description for violation in caught.value.violations}
    assert fields.keys() == {"blocks['mid']", "blocks['']", "blocks['down_blocks.2.']"}
    assert "structure, appearance, conv_in" in fields["blocks['mid']"]
    with pytest.raises(InvalidArgument, match=f"at most {MAX_BLOCKS}"):
        resolve_blocks({f"b{n}": 1.0 for n in range(MAX_BLOCKS + 1)}, LAYOUT)


def test_a_model_of_one_down_block_has_no_presets() -> None:
    small = BaseLayout("ab" * 32, (MatrixLayer("down_blocks.0.a", (2, 2)), MatrixLayer("b", (2, 2))), (), 4)
    with pytest.raises(InvalidArgument, match="no layer's name begins so"):
        resolve_blocks({"structure": 1.0}, small)
    assert resolve_blocks({"down_blocks.0": 1.0}, small) == BlockWeights((("down_blocks", 1.0),))


@given(GIVEN)
def test_the_canonical_form_means_what_was_given(given_weights: dict[str, float]) -> None:
    weights = table(resolve_blocks(given_weights, LAYOUT))
    for name, weight in weights.items():
        named = [block for block in given_weights if name == block or name.startswith(f"{block}.")]
        is_structure = name.startswith(("down_blocks.2.", "down_blocks.3."))
        preset = given_weights.get("structure" if is_structure else "appearance", 0.0)
        assert weight == (given_weights[max(named, key=len)] if named else preset)


@given(GIVEN)
def test_what_means_the_same_comes_out_equal(given_weights: dict[str, float]) -> None:
    resolved = resolve_blocks(given_weights, LAYOUT)
    # Said again layer by layer.
    assert resolve_blocks(table(resolved), LAYOUT) == resolved
    assert hash(resolve_blocks(dict(reversed(given_weights.items())), LAYOUT)) == hash(resolved)


@given(GIVEN, GIVEN, NUMBERS)
def test_sums_and_multiples_hold_for_every_layer(one: dict[str, float], two: dict[str, float], factor: float) -> None:
    first, second = resolve_blocks(one, LAYOUT), resolve_blocks(two, LAYOUT)
    a, b, total, scaled = (
        table(first),
        table(second),
        table(add_weights(first, second)),
        table(scale_weight(first, factor)),
    )
    assert all(total[name] == a[name] + b[name] and scaled[name] == factor * a[name] for name in LAYERS)
    assert add_weights(first, second) == add_weights(second, first)
    rest = table(complement(first))
    assert all(rest[name] == 1 - a[name] for name in LAYERS)


def test_sums_that_are_equal_everywhere_are_numbers() -> None:
    part = resolve_blocks({"mid_block": 2.0}, LAYOUT)
    assert add_weights(part, complement(part)) == 1.0
    assert add_weights(part, scale_weight(part, -1)) == 0.0
    assert add_weights(0.25, 0.5) == 0.75
    assert (complement(1.0), complement(0.0)) == (0.0, 1.0)
