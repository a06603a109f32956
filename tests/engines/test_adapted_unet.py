"""The adapted UNet against diffusers' own, and against weights rebuilt in fp64."""

import pytest
import torch
from tiny_unet import SD1_LIKE, TinyParts, run, tiny_parts
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import SLAB_PLANS, EngineRow, Plan
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import load_factors

# fp32 rounding through some eighty layers; outputs are of order 1. Seen on a 2-core x86 CPU (2026-11-20): 2e-6.
TOLERANCE = 2e-5

pytestmark = pytest.mark.usefixtures("one_thread")


def unet_of(parts: TinyParts, plan: Plan, channels_last: bool = True) -> AdaptedUNet:
    return AdaptedUNet(parts.base, parts.factors, parts.rows, plan, channels_last=channels_last)


def row_batch(parts: TinyParts, *rows: EngineRow) -> tuple[Tensor, Tensor]:
    """Rows as [N, size] each, the base's own where a row is None."""
    base = parts.rows.base_spectral(parts.factors, parts.norms)
    zeros = torch.zeros(parts.rows.lowrank_size)
    spectral = torch.stack([base if row.spectral is None else row.spectral for row in rows])
    return spectral, torch.stack([zeros if row.lowrank is None else row.lowrank for row in rows])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_base_rows_give_the_base(any_tiny: TinyParts, plan: Plan, channels_last: bool) -> None:
    inputs = any_tiny.inputs(3)
    spectral, lowrank = row_batch(any_tiny, *[EngineRow()] * 3)
    slab = None if plan is Plan.DENSE else spectral
    with torch.no_grad():
        out = unet_of(any_tiny, plan, channels_last)(*inputs, torch.arange(3), slab, lowrank)
    assert torch.allclose(out, run(any_tiny.base.unet, *inputs), atol=TOLERANCE)


@pytest.mark.parametrize("channels_last", [True, False])
def test_spectral_rows_equal_merged_weights(any_tiny: TinyParts, channels_last: bool) -> None:
    inputs = any_tiny.inputs(2)
    row = any_tiny.row((any_tiny.random_adapter(1), 0.8), (any_tiny.random_adapter(2), 0.3))
    expected = any_tiny.merged_output(row, *inputs)
    spectral, _ = row_batch(any_tiny, row)
    unet = unet_of(any_tiny, Plan.FACTORED, channels_last)
    with torch.no_grad():
        shared = unet.forward_rows(*inputs, spectral, None)
        each = unet.forward_rows(*inputs, spectral.repeat(2, 1), None)
    assert float((expected - run(any_tiny.base.unet, *inputs)).abs().max()) > 0.1, "the row must matter"
    assert torch.allclose(shared, expected, atol=TOLERANCE)
    assert torch.allclose(each, expected, atol=TOLERANCE)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_lowrank_rows_equal_merged_weights(any_tiny: TinyParts, plan: Plan, channels_last: bool) -> None:
    inputs = any_tiny.inputs(2)
    row = any_tiny.row((any_tiny.random_adapter(1, AdapterKind.LOWRANK), 0.8))
    expected = any_tiny.merged_output(row, *inputs)
    spectral, lowrank = row_batch(any_tiny, row)
    given = None if plan is Plan.DENSE else spectral
    unet = unet_of(any_tiny, plan, channels_last)
    with torch.no_grad():
        shared = unet.forward_rows(*inputs, given, lowrank)
        each = unet.forward_rows(*inputs, None if given is None else given.repeat(2, 1), lowrank.repeat(2, 1))
    assert float((expected - run(any_tiny.base.unet, *inputs)).abs().max()) > 0.02, "the row must matter"
    assert torch.allclose(shared, expected, atol=TOLERANCE)
    assert torch.allclose(each, expected, atol=TOLERANCE)


def test_every_layer_with_a_branch_equals_merged_weights() -> None:
    pointwise = ("linear_1", "linear_2", "time_emb_proj", "conv_shortcut", "proj_in", "proj_out", "to_q", "to_k")
    parts = tiny_parts(SD1_LIKE, (*pointwise, "to_v", "to_out.0", "net.0.proj", "net.2"), 3, text_side=True)
    assert {t.name for t in parts.rows.targets} == {m.name for m in parts.base.layout.matrices if m.is_pointwise}
    inputs = parts.inputs(2)
    row = parts.row((parts.random_adapter(1, AdapterKind.LOWRANK), 0.5), (parts.random_adapter(2), 0.5))
    expected = parts.merged_output(row, *inputs)
    for count in (1, 2):
        spectral, lowrank = row_batch(parts, *[row] * count)
        with torch.no_grad():
            out = unet_of(parts, Plan.FACTORED).forward_rows(*inputs, spectral, lowrank)
        assert torch.allclose(out, expected, atol=TOLERANCE)


def test_embedded_model_with_and_without_rows(base_model: BaseModel, cache_dir: object) -> None:
    factors = load_factors(base_model, cache_dir)  # type: ignore[arg-type]
    rows = RowLayout(base_model.layout, ("proj_out",), 16)
    norms = read_norms(base_model.layout, lambda name: base_model.unet.get_parameter(f"{name}.weight"))
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 4, 16, 24, generator=generator),
        torch.tensor([999.0, 20.5]),
        torch.randn(2, base_model.max_tokens, base_model.layout.token_width, generator=generator),
    )
    expected = run(base_model.unet, *inputs)
    base = rows.base_spectral(factors, norms)[None]
    with torch.no_grad():
        out = AdaptedUNet(base_model, factors, rows, Plan.FACTORED).forward_rows(*inputs, base, None)
        dense = AdaptedUNet(base_model, factors, rows, Plan.DENSE, channels_last=False)
        unchanged = dense.forward_rows(*inputs, None, None)
    assert torch.allclose(out, expected, atol=5e-5)
    assert torch.equal(unchanged, expected), "without channels_last and branch the operations are diffusers' own"


def test_gradients_of_rows_equal_finite_differences(tiny: TinyParts) -> None:
    inputs = tiny.inputs(2)
    row = tiny.row((tiny.random_adapter(1), 0.3), (tiny.random_adapter(2, AdapterKind.LOWRANK), 0.5))
    unet = unet_of(tiny, Plan.FACTORED)
    spectral, lowrank = (rows.requires_grad_() for rows in row_batch(tiny, row))
    weights = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def loss(s: Tensor, low: Tensor) -> Tensor:
        return (unet.forward_rows(*inputs, s, low) * weights).sum()

    loss(spectral, lowrank).backward()  # type: ignore[no-untyped-call]
    for rows, at in ((spectral, 0), (lowrank, 1)):
        assert rows.grad is not None
        # Along the gradient itself, where the derivative is largest against rounding.
        direction = rows.grad / rows.grad.norm()
        step = 1e-2 * direction
        with torch.no_grad():
            up = loss(spectral + step, lowrank) if at == 0 else loss(spectral, lowrank + step)
            down = loss(spectral - step, lowrank) if at == 0 else loss(spectral, lowrank - step)
        assert float((up - down) / 2e-2) == pytest.approx(float(rows.grad.norm()), rel=2e-2)


def test_shared_and_repeated_rows_have_the_same_gradient(tiny: TinyParts) -> None:
    inputs = tiny.inputs(3)
    row = tiny.row((tiny.random_adapter(1), 0.3), (tiny.random_adapter(2, AdapterKind.LOWRANK), 0.5))
    unet = unet_of(tiny, Plan.FACTORED)
    grads = []
    for count in (1, 3):
        spectral, lowrank = (rows.requires_grad_() for rows in row_batch(tiny, row))
        out = unet.forward_rows(*inputs, spectral.repeat(count, 1), lowrank.repeat(count, 1))
        out.square().mean().backward()  # type: ignore[no-untyped-call]
        grads.append((spectral.grad, lowrank.grad))
    for one, many in zip(*grads, strict=True):
        assert one is not None
        assert many is not None
        assert torch.allclose(one, many, atol=1e-6)


def test_base_is_shared_and_never_changed(tiny: TinyParts) -> None:
    before = {name: (t.data_ptr(), t.stride(), t.clone()) for name, t in tiny.base.unet.named_parameters()}
    dense = unet_of(tiny, Plan.DENSE, channels_last=False)
    pointers = {t.data_ptr() for t in tiny.base.unet.parameters()}
    assert all(t.data_ptr() in pointers for t in dense.parameters()), "weights are shared"
    for plan in SLAB_PLANS:
        unet_of(tiny, plan).to(torch.float16)
    for name, tensor in tiny.base.unet.named_parameters():
        pointer, stride, values = before[name]
        assert (tensor.data_ptr(), tensor.stride()) == (pointer, stride)
        assert torch.equal(tensor, values)


def test_rows_are_forgotten_after_a_call(tiny: TinyParts) -> None:
    unet = unet_of(tiny, Plan.FACTORED)
    spectral, lowrank = row_batch(tiny, EngineRow())
    with torch.no_grad():
        unet.forward_rows(*tiny.inputs(2), spectral, lowrank)
    with pytest.raises(RuntimeError):
        unet.forward_rows(torch.zeros(1), *tiny.inputs(2)[1:], spectral, lowrank)
    assert not unet.call_rows.values
    assert not unet.call_rows.branches


def test_rows_must_fit_plan_and_batch(tiny: TinyParts) -> None:
    inputs = tiny.inputs(3)
    spectral, lowrank = row_batch(tiny, EngineRow())
    with pytest.raises(InvalidArgument, match="no spectral row"):
        unet_of(tiny, Plan.FACTORED).forward_rows(*inputs, None, lowrank)
    with pytest.raises(InvalidArgument, match="a spectral row"):
        unet_of(tiny, Plan.DENSE).forward_rows(*inputs, spectral, lowrank)
    with pytest.raises(InvalidArgument, match="batch of 3"):
        unet_of(tiny, Plan.FACTORED).forward_rows(*inputs, spectral.repeat(2, 1), None)
    with pytest.raises(InvalidArgument, match="batch of 3"):
        unet_of(tiny, Plan.FACTORED).forward_rows(*inputs, spectral, lowrank.repeat(3, 1))


def test_half_precision_keeps_sigma_in_fp32(tiny: TinyParts) -> None:
    """Rows whose differences fp16 cannot hold still change the output."""
    unet = unet_of(tiny, Plan.FACTORED).half()
    sample, timestep, context = tiny.inputs(2)
    spectral, _ = row_batch(tiny, EngineRow())
    with torch.no_grad():
        out = unet.forward_rows(sample.half(), timestep, context.half(), spectral, None)
    assert out.dtype == torch.float16
    # fp16 weights: 1e-3 relative over the network (seen: 3e-3 at outputs of order 1).
    assert torch.allclose(out.float(), run(tiny.base.unet, sample, timestep, context), atol=2e-2)
