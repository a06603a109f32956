"""Sums of full deltas: linear up to half precision, exact where nothing is changed, beside parts of other kinds."""

from dataclasses import replace

import pytest
import torch
from dense_adapters import dense_adapter
from small_adapters import LAYOUT, lowrank_adapter, spectral_adapter
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.algebra import add, interpolate, mix_blocks, scale
from hueshift.adapters.blocks import resolve_blocks
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits

FIRST, SECOND = dense_adapter(LAYOUT, 0), dense_adapter(LAYOUT, 1, layers=["down.conv", "up.to_q"])
# Of the largest value of a delta, 0.2 times a weight of 2: half precision keeps 2^-11 of it.
STEP = 0.4 * 2.0**-11


def assert_delta(adapter: Adapter, layer: str, expected: Tensor) -> None:
    torch.testing.assert_close(adapter.dense[layer].double(), expected, rtol=0, atol=STEP)


def test_sums_add_deltas_layer_by_layer() -> None:
    total = add([(FIRST, 0.5), (SECOND, -2.0)])
    for layer, delta in FIRST.dense.items():
        other = SECOND.dense.get(layer, torch.zeros(()))
        assert_delta(total, layer, 0.5 * delta.double() - 2 * other.double())
    assert {delta.dtype for delta in total.dense.values()} == {torch.float16}
    assert total.kind is AdapterKind.DENSE
    assert read_adapter(write_adapter(total), LAYOUT, FileLimits()).dense.keys() == FIRST.dense.keys()


def test_what_one_adapter_alone_brings_keeps_its_values_and_wider_types_are_kept() -> None:
    wide = dense_adapter(LAYOUT, 2, layers=["up.to_q"], dtype=torch.float32)
    total = add([(FIRST, 1.0), (wide, 0.5)])
    assert torch.equal(total.dense["down.conv"], FIRST.dense["down.conv"])
    expected = FIRST.dense["up.to_q"].double() + 0.5 * wide.dense["up.to_q"].double()
    assert total.dense["up.to_q"].dtype is torch.float32
    torch.testing.assert_close(total.dense["up.to_q"], expected.float())


def test_interpolation_and_scaling() -> None:
    assert interpolate(FIRST, SECOND, 0) is FIRST
    assert interpolate(FIRST, SECOND, 1) is SECOND
    middle = interpolate(FIRST, SECOND, 0.25)
    assert_delta(middle, "up.to_q", 0.75 * FIRST.dense["up.to_q"].double() + 0.25 * SECOND.dense["up.to_q"].double())
    assert_delta(middle, "down.proj_out", 0.75 * FIRST.dense["down.proj_out"].double())
    assert_delta(scale(FIRST, -2), "down.conv", -2 * FIRST.dense["down.conv"].double())
    assert scale(FIRST, -2).dense["down.conv"].dtype is torch.float16


def test_blocks_have_weights_of_their_own() -> None:
    weight = resolve_blocks({"up": 1.0}, LAYOUT, "block")
    mixed = mix_blocks(FIRST, SECOND, weight)
    assert torch.equal(mixed.dense["up.to_q"], FIRST.dense["up.to_q"])
    assert torch.equal(mixed.dense["down.conv"], SECOND.dense["down.conv"])
    assert mixed.dense.keys() == {"up.to_q", "down.conv"}


@pytest.mark.parametrize("order", [1, -1])
def test_other_parts_stay_what_they_are_beside_deltas(order: int) -> None:
    spectral, lowrank = spectral_adapter(), lowrank_adapter()
    total = add([(FIRST, 1.0), (spectral, 1.0), (lowrank, 1.0)][::order])
    assert total.kind is AdapterKind.DENSE
    read = read_adapter(write_adapter(total), LAYOUT, FileLimits())
    assert all(torch.equal(read.dense[layer], delta) for layer, delta in FIRST.dense.items())
    assert all(torch.equal(read.spectral[layer], shift) for layer, shift in spectral.spectral.items())
    assert all(torch.equal(read.lowrank[layer].b, part.b) for layer, part in lowrank.lowrank.items())
    assert (read.norm.keys(), read.tokens.keys()) == (spectral.norm.keys(), spectral.tokens.keys())
    # Where no full deltas are, no file holds both.
    with pytest.raises(InvalidArgument, match="no file holds") as caught:
        add([(spectral, 1.0), (lowrank, 1.0)])
    assert caught.value.reason is Reason.ADAPTERS_INCOMPATIBLE


def test_deltas_of_other_shapes_do_not_add() -> None:
    other = replace(SECOND, dense={"up.to_q": torch.ones(6, 4).half()})
    with pytest.raises(InvalidArgument, match=r"'up\.to_q' has 4 x 6"):
        add([(FIRST, 1.0), (other, 0.5)])
