"""LoRA: ranks, scale, targets, and PiSSA's start at the principal triples, whose change is still zero."""

import pytest
import torch
from tiny_training import make_spec

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.branches import Branches
from hueshift.training.methods.make import make_learnable
from hueshift.training.spec import Method

Tiny = tuple[BaseModel, SpectralFactors]


def make(tiny: Tiny, **given: object) -> Branches:
    learnable = make_learnable(make_spec(Method.LORA, **given), *tiny)
    assert isinstance(learnable, Branches)
    return learnable


def test_branches_sit_on_the_targets_with_their_rank_and_alpha_over_rank(tiny: Tiny) -> None:
    learnable = make(tiny, rank=4, alpha=6.0, targets=("attn1.to_q", "proj_out"))
    values = learnable.initial(torch.Generator().manual_seed(0))
    adapter = learnable.adapter(values).adapter
    expected = {m.name for m in tiny[0].layout.matrices if m.name.endswith((".attn1.to_q", ".proj_out"))}
    assert set(adapter.lowrank) == expected
    assert {(parts.rank, parts.scale) for parts in adapter.lowrank.values()} == {(4, 1.5)}
    moved = {name: value + 1 for name, value in values.items()}
    row = learnable.rows(moved).lowrank
    assert row is not None
    target = learnable.layout.targets[0]
    b = row[0, target.begin + target.sizes[0] : target.end]
    # B is one everywhere, times alpha / rank = 6 / 4.
    assert b.tolist() == [1.5] * len(b)


@pytest.mark.parametrize("alpha", [8.0, 2.0])
def test_pissa_starts_at_the_principal_triples_and_changes_nothing(tiny: Tiny, alpha: float) -> None:
    base, factors = tiny
    learnable = make(tiny, rank=8, alpha=alpha, lora_init="pissa", targets=("attn1.to_q",))
    values = learnable.initial(torch.Generator())
    for name, rank in learnable.ranks.items():
        product = alpha / 8 * values[f"b/{name}"] @ values[f"a/{name}"]
        weight = base.unet.get_parameter(f"{name}.weight")
        sigma = factors.sigma[name]
        # What is left is everything but the strongest triples (Eckart and Young 1936).
        assert torch.linalg.norm(weight - product).item() == pytest.approx(sigma[rank:].norm().item(), rel=1e-4)
    adapter = learnable.adapter(values).adapter
    for parts in adapter.lowrank.values():
        assert parts.rank == 16
        assert (parts.b @ parts.a).abs().max() < 1e-6
    moved = {name: value * 1.5 for name, value in values.items()}
    change = next(iter(learnable.adapter(moved).adapter.lowrank.items()))
    name, parts = change
    # 1.5 A and 1.5 B make 2.25 times the product, so the change is 1.25 times it.
    expected = 1.25 * alpha / 8 * values[f"b/{name}"] @ values[f"a/{name}"]
    assert torch.allclose(parts.scale * parts.b @ parts.a, expected, atol=1e-5)


def test_a_rank_above_the_layers_own_is_cut(tiny: Tiny) -> None:
    widths = {m.rank for m in tiny[0].layout.matrices if m.name.endswith(".attn1.to_q")}
    assert set(make(tiny, rank=128, targets=("attn1.to_q",)).ranks.values()) == widths
    assert set(make(tiny, rank=128, targets=("attn1.to_q",), lora_init="pissa").ranks.values()) == {
        w // 2 for w in widths
    }


@pytest.mark.parametrize(("target", "text"), [("nowhere", "fits no layer"), ("conv1", "wider than 1x1")])
def test_targets_that_do_not_fit_are_named(tiny: Tiny, target: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text) as caught:
        make(tiny, targets=(target,))
    assert caught.value.violations[0].field == "settings.targets"
