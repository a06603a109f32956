"""DreamBooth of rank 0: what was learned is published whole, as fp16, the text side where every engine reads it."""

from typing import Any

import pytest
import torch
from tiny_training import make_spec
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import is_text_side
from hueshift.training.methods.learnable import Learnable
from hueshift.training.methods.make import make_learnable
from hueshift.training.spec import Method

Tiny = tuple[BaseModel, SpectralFactors]


def learned(tiny: Tiny, **given: Any) -> tuple[Learnable, dict[str, Tensor]]:
    """A job's learnable, and deltas of the size that training gives them."""
    learnable = make_learnable(make_spec(Method.DREAMBOOTH, rank=0, **given), *tiny)
    generator = torch.Generator().manual_seed(3)
    start = learnable.initial(generator)
    return learnable, {name: 1e-2 * torch.randn(value.shape, generator=generator) for name, value in start.items()}


def deltas_of(adapter: Adapter) -> dict[str, Tensor]:
    return {**adapter.dense, **adapter.kv}


def test_every_delta_is_published_as_it_is_but_for_its_dtype(tiny: Tiny) -> None:
    learnable, values = learned(tiny)
    made = learnable.adapter(values)
    adapter, layout = made.adapter, tiny[0].layout
    assert (adapter.kind, adapter.method, made.kept_energy) == (AdapterKind.DENSE, "dreambooth", None)
    assert not adapter.lowrank
    assert deltas_of(adapter).keys() == {layer.name for layer in layout.matrices}
    for layer in layout.matrices:
        delta = deltas_of(adapter)[layer.name]
        assert (delta.shape, delta.dtype) == ((layer.rows, layer.cols), torch.float16)
        assert torch.equal(delta, values[f"delta/{layer.name}"].half()), layer.name
    # What a run goes on with is not what it has published.
    values["delta/conv_in"].zero_()
    assert adapter.dense["conv_in"].any()


def test_keys_and_values_of_cross_attention_are_on_the_text_side(tiny: Tiny) -> None:
    learnable, values = learned(tiny)
    adapter = learnable.adapter(values).adapter
    attentions = tiny[0].layout.cross_attentions
    assert set(adapter.kv) == {f"{name}.{part}" for name in attentions for part in ("to_k", "to_v")}
    assert not any(map(is_text_side, adapter.dense))


def test_what_the_prompt_alone_reads_is_an_adapter_for_every_engine(tiny: Tiny) -> None:
    learnable, values = learned(tiny, targets=("attn2.to_v",))
    adapter = learnable.adapter(values).adapter
    assert (adapter.kind, dict(adapter.dense)) == (AdapterKind.KV, {})
    assert set(adapter.kv) == {f"{name}.to_v" for name in tiny[0].layout.cross_attentions}


def test_layers_that_learned_nothing_are_left_out(tiny: Tiny) -> None:
    learnable, values = learned(tiny, targets=("conv_in", "conv_out", "attn2.to_k"))
    values["delta/conv_in"].zero_()
    adapter = learnable.adapter(values).adapter
    assert set(adapter.dense) == {"conv_out"}
    nothing = learnable.adapter({name: torch.zeros_like(value) for name, value in values.items()}).adapter
    assert (nothing.kind, deltas_of(nothing)) == (AdapterKind.DENSE, {})


@pytest.mark.parametrize("largest", [65504.0, 1e6])
def test_what_fp16_cannot_hold_stays_fp32(tiny: Tiny, largest: float) -> None:
    learnable, values = learned(tiny, targets=("conv_in",))
    values["delta/conv_in"][0, 0] = largest
    delta = learnable.adapter(values).adapter.dense["conv_in"]
    assert delta.dtype is (torch.float16 if largest < 1e5 else torch.float32)
    assert float(delta[0, 0]) == largest
    values["delta/conv_in"].zero_()
    assert float(delta[0, 0]) == largest


def test_files_keep_every_bit(tiny: Tiny) -> None:
    learnable, values = learned(tiny)
    adapter = learnable.adapter(values).adapter
    read = read_adapter(write_adapter(adapter), tiny[0].layout, FileLimits())
    assert (read.kind, read.method) == (AdapterKind.DENSE, "dreambooth")
    for part, again in ((adapter.dense, read.dense), (adapter.kv, read.kv)):
        assert part.keys() == again.keys()
        assert all(torch.equal(delta, again[name]) for name, delta in part.items())
