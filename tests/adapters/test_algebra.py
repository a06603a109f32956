"""Sums, interpolation and scaling of adapters: linear in the deltas, exact at the ends."""

from dataclasses import replace

import pytest
import torch
from small_adapters import LAYOUT, lowrank_adapter, spectral_adapter, tensors_of
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.algebra import add, interpolate, scale
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits


def product(adapter: Adapter, layer: str) -> Tensor:
    """The change of a layer's matrix, in fp64."""
    part = adapter.lowrank.get(layer)
    if part is None:
        matrix = next(m for m in LAYOUT.matrices if m.name == layer)
        return torch.zeros(matrix.rows, matrix.cols, dtype=torch.float64)
    return part.scale * part.b.double() @ part.a.double()


def shift(adapter: Adapter, layer: str, size: int) -> Tensor:
    return {**adapter.spectral, **adapter.norm}.get(layer, torch.zeros(size)).double()


SHIFTS = [("up.to_q", 4), ("down.conv", 5), ("up.norm", 7), ("down.proj_out", 5)]


def test_sums_add_shifts_with_their_weights() -> None:
    first, second = spectral_adapter(0), replace(spectral_adapter(1, ""), spectral={"down.proj_out": torch.ones(5)})
    total = add([(first, 0.5), (second, -2.0)])
    for layer, size in SHIFTS:
        expected = 0.5 * shift(first, layer, size) - 2 * shift(second, layer, size)
        torch.testing.assert_close(shift(total, layer, size), expected, rtol=1e-6, atol=1e-6)
    assert total.method == "svdiff"
    assert total.identifier == ""
    assert total.tokens.keys() == {"sks"}


def test_sums_of_low_rank_products_join_their_ranks() -> None:
    first, second = lowrank_adapter(0, rank=2), lowrank_adapter(1, rank=3)
    total = add([(first, 0.5), (second, -2.0), (first, 0.25)])
    assert total.lowrank["down.proj_out"].rank == 7
    for layer in ("down.proj_out", "up.to_q"):
        expected = 0.75 * product(first, layer) - 2 * product(second, layer)
        torch.testing.assert_close(product(total, layer), expected, rtol=1e-5, atol=1e-5)
    read_adapter(write_adapter(total), LAYOUT, FileLimits())


def test_scaling_changes_the_model_in_proportion_and_leaves_words() -> None:
    for adapter in (spectral_adapter(), lowrank_adapter()):
        scaled = scale(adapter, -0.5)
        for layer, size in SHIFTS:
            torch.testing.assert_close(shift(scaled, layer, size), -0.5 * shift(adapter, layer, size))
            if "norm" not in layer:
                torch.testing.assert_close(product(scaled, layer), -0.5 * product(adapter, layer))
        assert scaled.tokens == adapter.tokens


@pytest.mark.parametrize(
    "pair", [(spectral_adapter(0), spectral_adapter(1)), (lowrank_adapter(0), lowrank_adapter(1, 3))]
)
def test_interpolation_is_exact_at_its_ends(pair: tuple[Adapter, Adapter]) -> None:
    for position, end in ((0, pair[0]), (1, pair[1]), (0.0, pair[0]), (1.0, pair[1])):
        reached = interpolate(*pair, position)
        assert write_adapter(reached) == write_adapter(end)


def test_interpolation_weights_both_in_between() -> None:
    first, second = spectral_adapter(0), spectral_adapter(1)
    middle = interpolate(first, second, 0.25)
    for layer, size in SHIFTS:
        expected = 0.75 * shift(first, layer, size) + 0.25 * shift(second, layer, size)
        torch.testing.assert_close(shift(middle, layer, size), expected, rtol=1e-6, atol=1e-6)
    expected_word = 0.75 * first.tokens["sks"] + 0.25 * second.tokens["sks"]
    torch.testing.assert_close(middle.tokens["sks"], expected_word)
    assert middle.identifier == "sks"


def test_inputs_stay_as_they_were() -> None:
    first, second = lowrank_adapter(0), lowrank_adapter(1)
    before = {name: tensor.clone() for name, tensor in tensors_of(first).items()}
    add([(first, 2.0), (second, 3.0)])
    interpolate(first, second, 0.5)
    scale(first, 9.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(first).items())


def test_what_does_not_fit_together_is_refused() -> None:
    first = spectral_adapter()
    others = {
        "base models": replace(first, base_hash="cd" * 32),
        "kinds": lowrank_adapter(),
        "'sks', differently": spectral_adapter(1),
        "shifts": replace(first, spectral={"up.to_q": torch.zeros(3)}),
    }
    for text, other in others.items():
        with pytest.raises(InvalidArgument, match=text) as caught:
            add([(first, 1.0), (other, 1.0)])
        assert caught.value.reason is Reason.ADAPTERS_INCOMPATIBLE
    with pytest.raises(InvalidArgument, match="base models"):
        interpolate(first, others["base models"], 0.0)


def test_numbers_out_of_range_are_refused() -> None:
    first = spectral_adapter()
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="finite"):
            add([(first, value)])
        with pytest.raises(InvalidArgument, match="finite"):
            scale(first, value)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidArgument, match="0 to 1"):
            interpolate(first, first, value)
    with pytest.raises(InvalidArgument, match="one or more"):
        add([])
