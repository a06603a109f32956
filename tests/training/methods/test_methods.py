"""Both methods start at the base, learn only what they should, and become adapters that serve what was trained."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_training import make_spec, make_tiny_unet
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.learnable import Learnable
from hueshift.training.methods.make import make_learnable
from hueshift.training.methods.residuals import residual_rank
from hueshift.training.spec import Method
from hueshift.training.unet import TrainingUNet

Tiny = tuple[BaseModel, SpectralFactors]
WITH_TENSORS = [method for method in Method if method is not Method.TEXTUAL_INVERSION]


def make(tiny: Tiny, method: Method, **given: Any) -> tuple[Learnable, TrainingUNet]:
    spec = make_spec(method, **given)
    return make_learnable(spec, *tiny), make_tiny_unet(*tiny, spec)


def merge(base: BaseModel, factors: SpectralFactors, adapter: Adapter) -> Any:
    unet = copy.deepcopy(base.unet)

    def add(name: str, delta: Tensor) -> None:
        weight = unet.get_parameter(f"{name}.weight")
        weight.data.copy_((weight.double() + delta.double().reshape(weight.shape)).float())

    for name, shift in adapter.spectral.items():
        u, sigma, vh = (part[name].double() for part in (factors.u, factors.sigma, factors.vh))
        add(name, (u * ((sigma + shift.double()).relu() - sigma)) @ vh)
    for name, parts in adapter.lowrank.items():
        add(name, parts.scale * parts.b.double() @ parts.a.double())
    for name, delta in (*adapter.kv.items(), *adapter.norm.items()):
        add(name, delta)
    return unet


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
            out = unet(sample, steps, context, rows)
            assert torch.allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("method", WITH_TENSORS)
def test_gradients_reach_every_learned_tensor_and_no_weight(tiny: Tiny, method: Method) -> None:
    learnable, unet = make(tiny, method)
    sample, steps, context = inputs(tiny[0])
    values = {name: value.requires_grad_() for name, value in disturbed(learnable).items()}
    unet(sample, steps, context, learnable.rows(values)).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, value in values.items():
        assert value.grad is not None, name
        # Convolutions see padding, dead singular values (rank below the row's) see nothing: a few zeros are right.
        assert (value.grad != 0).float().mean() > 0.95, name
    assert all(parameter.grad is None for parameter in tiny[0].unet.parameters())


@pytest.mark.parametrize("method", WITH_TENSORS)
def test_the_adapter_holds_what_was_trained(tiny: Tiny, method: Method) -> None:
    """Against diffusers' own UNet with the adapter written into its weights in fp64."""
    base, factors = tiny
    # A rank that loses nothing, where there is one to compress to.
    learnable, unet = make(tiny, method, **({"rank": 128} if method is Method.DREAMBOOTH else {}))
    values = disturbed(learnable)
    learned = learnable.adapter(values)
    assert (learned.adapter.base_hash, learned.adapter.method) == (base.base_hash, method)
    sample, steps, context = inputs(base)
    with torch.no_grad():
        trained = unet(sample, steps, context, learnable.rows(values))
        merged = merge(base, factors, learned.adapter)(sample, steps, encoder_hidden_states=context).sample
        plain = base.unet(sample, steps, encoder_hidden_states=context).sample
    scale = float(merged.abs().max())
    assert torch.allclose(trained, merged, atol=1e-4 * scale)
    assert not torch.allclose(plain, merged, atol=1e-2 * scale)


@pytest.mark.parametrize("method", [Method.SVDIFF, Method.RESIDUALS, Method.LORA])
def test_the_engine_composes_the_row_that_was_trained(tiny: Tiny, method: Method) -> None:
    base, factors = tiny
    learnable, _ = make(tiny, method)
    values = disturbed(learnable)
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    row = learnable.layout.compose([(learnable.adapter(values).adapter, 1.0)], factors, norms)
    rows = learnable.rows(values)
    for served, trained in ((row.spectral, rows.spectral), (row.lowrank, rows.lowrank)):
        if trained is None:
            assert served is None
        else:
            assert served is not None
            assert torch.allclose(served, trained[0], atol=1e-6)


def test_shifts_cover_all_matrices_and_norm_weights_and_no_bias(tiny: Tiny) -> None:
    learnable, _ = make(tiny, Method.SVDIFF)
    layout = tiny[0].layout
    adapter = learnable.adapter(learnable.initial(torch.Generator())).adapter
    assert adapter.kind is AdapterKind.SPECTRAL
    assert {name: len(shift) for name, shift in adapter.spectral.items()} == {m.name: m.rank for m in layout.matrices}
    assert {name: len(shift) for name, shift in adapter.norm.items()} == {n.name: n.size for n in layout.norms}
    assert sum(value.numel() for value in learnable.initial(torch.Generator()).values()) == layout.spectral_size


def test_a_shift_below_minus_sigma_stops_at_zero(tiny: Tiny) -> None:
    learnable, _ = make(tiny, Method.SVDIFF)
    values = learnable.initial(torch.Generator())
    spectral = learnable.rows({**values, "sigma": values["sigma"] - 1e6}).spectral
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
    adapter = learnable.adapter(values).adapter
    # diffusers' name for the last layer of a transformer block.
    expected = {m.name: m for m in tiny[0].layout.matrices if m.name.endswith(".proj_out")}
    assert set(adapter.lowrank) == set(expected)
    for name, factors in adapter.lowrank.items():
        assert factors.rank == max(1, math.floor(0.05 * expected[name].rows))
        assert (factors.b == 0).all()
        assert factors.a.std().item() == pytest.approx(1 / math.sqrt(expected[name].cols), rel=0.5)
    assert [residual_rank(m, m) for m in (8, 64, 128, 256, 320, 1280)] == [1, 3, 6, 12, 16, 64]
