"""Both methods start at the base, learn only what they should, and become adapters that serve what was trained."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_training import make_spec
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.parameters import Learnable, residual_rank
from hueshift.training.run import make_learnable
from hueshift.training.spec import Method

Tiny = tuple[BaseModel, SpectralFactors]


def make(tiny: Tiny, method: Method) -> tuple[Learnable, AdaptedUNet]:
    base, factors = tiny
    learnable = make_learnable(make_spec(method), base, factors)
    return learnable, AdaptedUNet(base, factors, learnable.layout, learnable.plan)


def inputs(base: BaseModel) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 5, base.layout.token_width, generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700]), context


def disturbed(learnable: Learnable) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    start = learnable.initial(generator)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}


@pytest.mark.parametrize("method", Method)
def test_step_zero_is_the_base_model(tiny: Tiny, method: Method) -> None:
    learnable, unet = make(tiny, method)
    sample, steps, context = inputs(tiny[0])
    start = learnable.initial(torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny[0].unet(sample, steps, encoder_hidden_states=context).sample
        for rows in (learnable.rows(start), learnable.base_rows()):
            out = unet.forward_rows(sample, steps, context, *rows)
            assert torch.allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("method", Method)
def test_gradients_reach_every_learned_tensor_and_no_weight(tiny: Tiny, method: Method) -> None:
    learnable, unet = make(tiny, method)
    sample, steps, context = inputs(tiny[0])
    values = {name: value.requires_grad_() for name, value in disturbed(learnable).items()}
    unet.forward_rows(sample, steps, context, *learnable.rows(values)).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, value in values.items():
        assert value.grad is not None, name
        # Convolutions see padding, dead singular values (rank below the row's) see nothing: a few zeros are right.
        assert (value.grad != 0).float().mean() > 0.95, name
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(parameter.grad is None for parameter in tiny[0].unet.parameters())


@pytest.mark.parametrize("method", Method)
def test_the_adapter_serves_what_was_trained(tiny: Tiny, method: Method) -> None:
    base, factors = tiny
    learnable, _ = make(tiny, method)
    values = disturbed(learnable)
    tokens = {"sks": torch.ones(1, base.layout.token_width)}
    adapter = learnable.adapter(values, tokens, "sks")
    assert (adapter.base_hash, adapter.method, adapter.identifier) == (base.base_hash, method, "sks")
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    row = learnable.layout.compose([(adapter, 1.0)], factors, norms)
    for served, trained in zip((row.spectral, row.lowrank), learnable.rows(values), strict=True):
        if trained is None:
            assert served is None
        else:
            assert served is not None
            assert torch.allclose(served, trained[0], atol=1e-6)


def test_shifts_cover_all_matrices_and_norm_weights_and_no_bias(tiny: Tiny) -> None:
    learnable, _ = make(tiny, Method.SVDIFF)
    layout = tiny[0].layout
    adapter = learnable.adapter(learnable.initial(torch.Generator()), {}, "sks")
    assert adapter.kind is AdapterKind.SPECTRAL
    assert {name: len(shift) for name, shift in adapter.spectral.items()} == {m.name: m.rank for m in layout.matrices}
    assert {name: len(shift) for name, shift in adapter.norm.items()} == {n.name: n.size for n in layout.norms}
    assert sum(value.numel() for value in learnable.initial(torch.Generator()).values()) == layout.spectral_size


def test_a_shift_below_minus_sigma_stops_at_zero(tiny: Tiny) -> None:
    learnable, _ = make(tiny, Method.SVDIFF)
    values = learnable.initial(torch.Generator())
    spectral, _ = learnable.rows({**values, "sigma": values["sigma"] - 1e6})
    assert spectral is not None
    assert (spectral[0, : tiny[0].layout.sigma_size] == 0).all()


def test_norms_and_matrices_have_their_own_learning_rates(tiny: Tiny) -> None:
    spec = replace(make_spec(), learning_rate=0.25, norm_learning_rate=0.125)
    learnable = make_learnable(spec, *tiny)
    assert learnable.learning_rate("sigma") == 0.25
    assert learnable.learning_rate("norm") == 0.125


def test_residuals_sit_on_the_block_outputs_with_the_papers_ranks(tiny: Tiny) -> None:
    learnable, _ = make(tiny, Method.RESIDUALS)
    values = learnable.initial(torch.Generator().manual_seed(0))
    adapter = learnable.adapter(values, {}, "sks")
    # diffusers' name for the last layer of a transformer block.
    expected = {m.name: m for m in tiny[0].layout.matrices if m.name.endswith(".proj_out")}
    assert set(adapter.lowrank) == set(expected)
    for name, factors in adapter.lowrank.items():
        assert factors.rank == max(1, math.floor(0.05 * expected[name].rows))
        assert (factors.b == 0).all()
        assert factors.a.std().item() == pytest.approx(1 / math.sqrt(expected[name].cols), rel=0.5)
    assert [residual_rank(m, m) for m in (8, 64, 128, 256, 320, 1280)] == [1, 3, 6, 12, 16, 64]
