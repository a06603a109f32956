"""Composing adapters into engine rows."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_unet import TinyParts

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.errors import FailedPrecondition, HueshiftError, InvalidArgument, Reason
from hueshift.engines.rows import RowLayout

LOWRANK = AdapterKind.LOWRANK


def test_empty_mix_and_empty_adapter_leave_the_base(tiny: TinyParts) -> None:
    empty = Adapter(AdapterKind.SPECTRAL, tiny.base.base_hash, "svdiff")
    for row in (tiny.row(), tiny.row((empty, 1.0))):
        assert row.spectral is None
        assert row.lowrank is None
        assert not row.needs_factored


def test_weight_zero_is_the_base_row(tiny: TinyParts) -> None:
    row = tiny.row((tiny.random_adapter(1), 0.0))
    assert row.spectral is not None
    assert torch.equal(row.spectral, tiny.rows.base_spectral(tiny.factors, tiny.norms))


def test_spectral_adapters_add_and_clamp_at_minus_sigma(tiny: TinyParts) -> None:
    one, two = tiny.random_adapter(1), tiny.random_adapter(2)
    row = tiny.row((one, 0.7), (two, -1.5))
    assert row.spectral is not None
    assert row.lowrank is None
    layout = tiny.base.layout
    clamped = 0
    for layer in layout.matrices:
        begin = layout.matrix_offsets[layer.name]
        raw = tiny.factors.sigma[layer.name] + 0.7 * one.spectral[layer.name] - 1.5 * two.spectral[layer.name]
        clamped += int((raw < 0).sum())
        assert torch.allclose(row.spectral[begin : begin + layer.rank], raw.clamp(min=0), atol=1e-6)
    assert clamped > 20
    for norm in layout.norms:
        begin = layout.norm_offsets[norm.name]
        expected = tiny.norms[norm.name] + 0.7 * one.norm[norm.name] - 1.5 * two.norm[norm.name]
        assert torch.allclose(row.spectral[begin : begin + norm.size], expected, atol=1e-6)
    assert bool((row.spectral[layout.sigma_size :] < 0).any()), "norm weights are not singular values: no clamp"


def test_interpolation_meets_its_endpoints(tiny: TinyParts) -> None:
    one, two = tiny.random_adapter(1), tiny.random_adapter(2)
    for alpha, alone in ((1.0, one), (0.0, two)):
        mixed, single = tiny.row((one, alpha), (two, 1 - alpha)), tiny.row((alone, 1.0))
        assert mixed.spectral is not None
        assert single.spectral is not None
        assert torch.equal(mixed.spectral, single.spectral)


def test_order_of_adapters_does_not_matter(tiny: TinyParts) -> None:
    one, two = tiny.random_adapter(1), tiny.random_adapter(2)
    a, b = tiny.row((one, 0.5), (two, 0.25)).spectral, tiny.row((two, 0.25), (one, 0.5)).spectral
    assert a is not None
    assert b is not None
    assert torch.allclose(a, b, atol=1e-6)


def test_lowrank_adapters_concatenate_with_scale_and_weight_folded(tiny: TinyParts) -> None:
    one, two = tiny.random_adapter(1, LOWRANK), tiny.random_adapter(2, LOWRANK)
    row = tiny.row((one, 0.5), (two, 2.0))
    assert row.spectral is None
    assert row.lowrank is not None
    assert row.lowrank.shape == (tiny.rows.lowrank_size,)
    for target in tiny.rows.targets:
        size_a, _ = target.sizes
        a = row.lowrank[target.begin : target.begin + size_a].view(target.rank, target.cols)
        b = row.lowrank[target.begin + size_a : target.end].view(target.rows, target.rank)
        expected = sum(
            weight * parts.scale * parts.b @ parts.a
            for weight, parts in ((0.5, one.lowrank[target.name]), (2.0, two.lowrank[target.name]))
        )
        assert torch.allclose(b @ a, torch.as_tensor(expected), atol=1e-5)


def test_lowrank_on_some_targets_leaves_zeros_elsewhere(tiny: TinyParts) -> None:
    whole = tiny.random_adapter(1, LOWRANK)
    first, *others = tiny.rows.targets
    row = tiny.row((replace(whole, lowrank={first.name: whole.lowrank[first.name]}), 1.0)).lowrank
    assert row is not None
    assert bool(row[first.begin : first.end].any())
    assert not any(bool(row[target.begin : target.end].any()) for target in others)


def test_pack_lowrank_passes_gradients(tiny: TinyParts) -> None:
    target = tiny.rows.targets[0]
    a = torch.randn(2, target.cols, requires_grad=True)
    b = torch.randn(target.rows, 2, requires_grad=True)
    tiny.rows.pack_lowrank({target.name: (a, b)}).square().sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, 2 * a)
    assert torch.allclose(b.grad, 2 * b)


def test_rank_is_capped_by_the_matrix(tiny: TinyParts) -> None:
    rows = RowLayout(tiny.base.layout, ("proj_out",), 1000)
    assert all(target.rank == min(target.rows, target.cols) for target in rows.targets)
    assert rows.lowrank_size == sum(t.rank * (t.rows + t.cols) for t in rows.targets)


def test_no_targets_is_a_layout(tiny: TinyParts) -> None:
    rows = RowLayout(tiny.base.layout, (), 4)
    assert rows.targets == ()
    assert rows.lowrank_size == 0


@pytest.mark.parametrize(
    ("targets", "rank", "named"),
    [(("proj_uot",), 4, "proj_uot"), (("conv1",), 4, "wider than 1x1"), (("proj_out",), 0, "below 1")],
)
def test_wrong_settings_are_refused(tiny: TinyParts, targets: tuple[str, ...], rank: int, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named) as caught:
        RowLayout(tiny.base.layout, targets, rank)
    assert caught.value.reason is Reason.SETTINGS_INVALID


def _spectral(name: str, size: int) -> Callable[[TinyParts], Adapter]:
    return lambda tiny: replace(tiny.random_adapter(1), spectral={name: torch.zeros(size)}, norm={})


def _lowrank(name: str, rank: int, cols: int, rows: int) -> Callable[[TinyParts], Adapter]:
    factors = LowRankFactors(torch.zeros(rank, cols), torch.zeros(rows, rank))
    return lambda tiny: Adapter(LOWRANK, tiny.base.base_hash, "lora", lowrank={name: factors})


PROJ_OUT = "down_blocks.0.attentions.0.proj_out"


@pytest.mark.parametrize(
    ("make", "reason", "kind"),
    [
        (
            lambda tiny: replace(tiny.random_adapter(1), base_hash="f" * 64),
            Reason.ADAPTER_BASE_MISMATCH,
            FailedPrecondition,
        ),
        (_spectral("conv_inn", 16), Reason.ADAPTER_TENSOR_UNKNOWN, InvalidArgument),
        (_spectral("conv_norm_out", 16), Reason.ADAPTER_TENSOR_UNKNOWN, InvalidArgument),
        (_spectral("conv_in", 15), Reason.ADAPTER_SHAPE_MISMATCH, InvalidArgument),
        (_lowrank("conv_in", 2, 36, 16), Reason.ADAPTER_TARGET_UNSUPPORTED, InvalidArgument),
        (_lowrank(PROJ_OUT, 5, 16, 16), Reason.ADAPTER_RANK_TOO_LARGE, InvalidArgument),
        (_lowrank(PROJ_OUT, 2, 15, 16), Reason.ADAPTER_SHAPE_MISMATCH, InvalidArgument),
        (_lowrank(PROJ_OUT, 2, 16, 17), Reason.ADAPTER_SHAPE_MISMATCH, InvalidArgument),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: TinyParts, make: Callable[[TinyParts], Adapter], reason: Reason, kind: type[HueshiftError]
) -> None:
    with pytest.raises(kind) as caught:
        tiny.row((make(tiny), 1.0))
    assert caught.value.reason is reason


def test_ranks_together_may_overflow(tiny: TinyParts) -> None:
    mix = [(tiny.random_adapter(seed, LOWRANK), 1.0) for seed in range(3)]
    tiny.row(*mix[:2])
    with pytest.raises(InvalidArgument, match=r"rank 6 together, at most 4 fits") as caught:
        tiny.row(*mix)
    assert caught.value.reason is Reason.ADAPTER_RANK_TOO_LARGE


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_must_be_finite(tiny: TinyParts, weight: float) -> None:
    with pytest.raises(InvalidArgument, match="not finite"):
        tiny.row((tiny.random_adapter(1), weight))
