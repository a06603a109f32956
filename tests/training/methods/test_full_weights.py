"""Custom Diffusion and DreamBooth: which weights, what is stored, and how much a rank keeps, worked out by SVD."""

from typing import Any

import pytest
import torch
from tiny_training import make_spec
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.compression import compress_deltas
from hueshift.training.methods.learnable import Learnable
from hueshift.training.methods.make import make_learnable
from hueshift.training.spec import Method

Tiny = tuple[BaseModel, SpectralFactors]


def make(tiny: Tiny, method: Method, **given: Any) -> tuple[Learnable, dict[str, Tensor]]:
    learnable = make_learnable(make_spec(method, **given), *tiny)
    generator = torch.Generator().manual_seed(3)
    start = learnable.initial(generator)
    return learnable, {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}


def test_custom_diffusion_learns_keys_and_values_of_cross_attention_alone(tiny: Tiny) -> None:
    learnable, values = make(tiny, Method.CUSTOM_DIFFUSION)
    expected = {m.name for m in tiny[0].layout.matrices if m.name.endswith((".attn2.to_k", ".attn2.to_v"))}
    assert {name.removeprefix("delta/") for name in values} == expected
    learned = learnable.adapter(values)
    assert learned.kept_energy is None
    assert learned.adapter.kind is AdapterKind.KV
    assert set(learned.adapter.kv) == expected
    assert all(torch.equal(delta, values[f"delta/{name}"]) for name, delta in learned.adapter.kv.items())
    assert not learned.adapter.lowrank


def test_a_rank_turns_the_deltas_into_products_and_tells_what_they_keep(tiny: Tiny) -> None:
    learnable, values = make(tiny, Method.CUSTOM_DIFFUSION, rank=4)
    learned = learnable.adapter(values)
    assert (learned.adapter.kind, dict(learned.adapter.kv)) == (AdapterKind.LOWRANK, {})
    kept = total = 0.0
    for name, parts in learned.adapter.lowrank.items():
        sigma = torch.linalg.svdvals(values[f"delta/{name}"].double())
        assert parts.rank == 4
        lost = torch.linalg.norm(values[f"delta/{name}"].double() - parts.b.double() @ parts.a.double())
        assert lost.item() == pytest.approx(sigma[4:].norm().item(), rel=1e-5)
        kept, total = kept + sigma[:4].square().sum().item(), total + sigma.square().sum().item()
    assert learned.kept_energy == pytest.approx(kept / total, rel=1e-6)


def test_energy_is_that_of_all_layers_together() -> None:
    deltas = {
        "a": torch.diag(torch.tensor([3.0, 1.0])),
        "b": torch.diag(torch.tensor([2.0, 2.0])),
        "c": torch.zeros(2, 2),
    }
    factors, kept = compress_deltas(deltas, 1)
    assert set(factors) == {"a", "b"}
    assert kept == pytest.approx((9 + 4) / (9 + 1 + 4 + 4))
    assert compress_deltas({"c": torch.zeros(2, 2)}, 1) == ({}, 1.0)


def test_dreambooth_learns_every_matrix_or_those_that_are_named(tiny: Tiny) -> None:
    _, every = make(tiny, Method.DREAMBOOTH)
    assert {name.removeprefix("delta/") for name in every} == {m.name for m in tiny[0].layout.matrices}
    learnable, some = make(tiny, Method.DREAMBOOTH, targets=("attn2.to_v", "conv_in"), rank=2)
    assert {name.rpartition(".")[2] for name in some} == {"to_v", "delta/conv_in"}
    adapter = learnable.adapter(some).adapter
    conv = adapter.lowrank["conv_in"]
    assert (tuple(conv.a.shape), tuple(conv.b.shape)) == ((2, 36), (32, 2))
    with pytest.raises(InvalidArgument, match="fits no layer"):
        make(tiny, Method.DREAMBOOTH, targets=("nowhere",))


def test_nothing_learned_is_an_adapter_of_nothing(tiny: Tiny) -> None:
    learnable, values = make(tiny, Method.DREAMBOOTH)
    learned = learnable.adapter({name: torch.zeros_like(value) for name, value in values.items()})
    assert (learned.adapter.lowrank, learned.kept_energy) == ({}, 1.0)
