"""Keys and values made once per request: equal to diffusers' own layers whose weights were changed in fp64."""

from dataclasses import replace

import pytest
import torch
from text_side_adapters import gated, kv_deltas
from tiny_unet import TinyParts, merge_row, run, tiny_unet
from torch import Tensor, nn

from hueshift.adapters.adapter import Adapter, AdapterKind, GatedEdit, LowRankFactors
from hueshift.adapters.blocks import BlockWeights
from hueshift.engines.cross_attention import CrossEdits, CrossLayout, CrossStage
from hueshift.engines.interface import EngineRow
from hueshift.engines.text_side import compose_text_side

# fp32 sums of 24 and 16 terms against fp64.
CLOSE = 2e-5

pytestmark = pytest.mark.usefixtures("one_thread")


def contexts(parts: TinyParts, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, 5, parts.base.layout.token_width, generator=generator)


def branches(parts: TinyParts, seed: int, rank: int) -> Adapter:
    """A low-rank adapter of every key and value layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = [parts.base.layout.matrix(name) for name in CrossLayout(parts.base.layout).spans]
    lowrank = {
        layer.name: LowRankFactors(
            torch.randn(rank, layer.cols, generator=generator), torch.randn(layer.rows, rank, generator=generator), 0.3
        )
        for layer in layers
        if layer is not None
    }
    return Adapter(AdapterKind.LOWRANK, parts.base.base_hash, "lora", lowrank=lowrank)


def changed_weight(parts: TinyParts, name: str, *mix: tuple[Adapter, float]) -> Tensor:
    """W' in fp64: U diag(relu(sigma + sum w delta)) V^T + sum w (scale B A + D)."""
    weight = parts.base.unet.get_parameter(f"{name}.weight").double()
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    shift = torch.zeros_like(sigma)
    added = torch.zeros_like(weight)
    for adapter, share in mix:
        if name in adapter.spectral:
            shift += share * adapter.spectral[name].double()
        if name in adapter.kv:
            added += share * adapter.kv[name].double()
        if name in adapter.lowrank:
            factors = adapter.lowrank[name]
            added += share * factors.scale * factors.b.double() @ factors.a.double()
    changed: Tensor = (u * (sigma + shift).relu()) @ vh + added
    return changed


def test_layout_follows_the_order_in_which_layers_run(tiny: TinyParts) -> None:
    layout = CrossLayout(tiny.base.layout)
    seen: list[str] = []
    for name, module in tiny.base.unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(lambda _module, _args, name=name: seen.append(name))
    try:
        run(tiny.base.unet, *tiny.inputs(1))
    finally:
        for module in tiny.base.unet.modules():
            module._forward_pre_hooks.clear()
    assert list(layout.attentions) == seen
    ends = [0, *(end for _, end in layout.spans.values())]
    assert [begin for begin, _ in layout.spans.values()] == ends[:-1]
    assert layout.width == ends[-1]


def test_base_equals_the_layers_of_diffusers(any_tiny: TinyParts) -> None:
    stage = CrossStage(any_tiny.base, any_tiny.factors)
    context = contexts(any_tiny, 3)
    out = stage.project(context, context, CrossEdits())
    assert out.shape == (3, 5, stage.layout.width)
    for name, (begin, end) in stage.layout.spans.items():
        with torch.no_grad():
            expected = any_tiny.base.unet.get_submodule(name)(context)
        assert torch.equal(out[..., begin:end], expected)


@pytest.mark.parametrize("kind", ["spectral", "lowrank", "kv", "all"])
def test_edits_equal_weights_changed_in_fp64(any_tiny: TinyParts, kind: str) -> None:
    layout = any_tiny.base.layout
    every = {
        "spectral": [(any_tiny.random_adapter(1), 0.8), (any_tiny.random_adapter(2), 0.5)],
        # Together more ranks than a branch of the engine has.
        "lowrank": [(branches(any_tiny, 1, 4), 0.5), (branches(any_tiny, 2, 8), -1.5)],
        "kv": [(kv_deltas(layout, "<a>"), 1.0), (kv_deltas(layout, "<b>", seed=4), 0.25)],
    }
    mix = [pair for pairs in every.values() for pair in pairs] if kind == "all" else every[kind]
    side = compose_text_side(mix, any_tiny.factors)
    stage = CrossStage(any_tiny.base, any_tiny.factors)
    context = contexts(any_tiny, 2)
    out, plain = (stage.project(context, context, edits) for edits in (side.edits, CrossEdits()))
    assert float((out - plain).abs().max()) > 0.1, "the edits must matter"
    for name, (begin, end) in stage.layout.spans.items():
        expected = context.double() @ changed_weight(any_tiny, name, *mix).T
        assert torch.allclose(out[..., begin:end].double(), expected, atol=CLOSE, rtol=CLOSE), name


def test_a_unet_that_reads_cross_equals_one_with_changed_layers(any_tiny: TinyParts) -> None:
    """The whole way: keys and values from here in place of the context."""
    adapter = any_tiny.random_adapter(1)
    adapter = replace(adapter, norm={}, spectral={n: s for n, s in adapter.spectral.items() if ".attn2.to_" in n})
    latents, timesteps, _ = any_tiny.inputs(2)
    context = contexts(any_tiny, 2)
    side = compose_text_side([(adapter, 1.0)], any_tiny.factors)
    cross = CrossStage(any_tiny.base, any_tiny.factors).project(context, context, side.edits)
    row = any_tiny.row((adapter, 1.0))
    found = any_tiny.merged_output(row, latents, timesteps, cross)
    expected = _merged(any_tiny, row)(latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]
    assert torch.allclose(found, expected, atol=2e-5)


def _merged(parts: TinyParts, row: EngineRow) -> nn.Module:
    unet = tiny_unet(parts.base.unet.config)
    unet.load_state_dict(parts.base.unet.state_dict())
    merge_row(unet, parts, row)
    return unet


def perfusion(edit: GatedEdit, name: str, weight: Tensor, tokens: Tensor) -> Tensor:
    """Tewel et al. 2023, equation 5, token by token in fp64: W (e - s i*) + g o*, s = <C^-1 i*, e> / <C^-1 i*, i*>."""
    weight, target, dual = weight.double(), edit.target.double(), edit.dual.double()
    rows = []
    for token in tokens.double():
        similarity = float(dual @ token) / float(dual @ target)
        gate = 1 / (1 + torch.exp(torch.tensor(-(similarity - edit.beta) / edit.tau, dtype=torch.float64)))
        rows.append(weight @ (token - similarity * target) + gate * edit.outputs[name].double())
    return torch.stack(rows)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_gated_edits_equal_perfusions_equation(any_tiny: TinyParts, share: float) -> None:
    adapter = gated(any_tiny.base.layout)
    edit = adapter.gated["<locked>"]
    context = contexts(any_tiny, 1)
    # Two tokens that are the concept, as a whole and for the most part.
    context[0, 1], context[0, 2] = edit.target, 0.8 * edit.target + 0.1 * context[0, 2]
    side = compose_text_side([(adapter, share)], any_tiny.factors)
    stage = CrossStage(any_tiny.base, any_tiny.factors)
    out = stage.project(context, context, side.edits)
    for name, (begin, end) in stage.layout.spans.items():
        weight = any_tiny.base.unet.get_parameter(f"{name}.weight")
        plain = context[0].double() @ weight.double().T
        expected = plain + share * (perfusion(edit, name, weight, context[0]) - plain)
        assert torch.allclose(out[0, :, begin:end].double(), expected, atol=CLOSE, rtol=CLOSE), name
        if share == 1:
            locked = edit.outputs[name] / (1 + torch.exp(torch.tensor(-(1 - edit.beta) / edit.tau)))
            assert torch.allclose(out[0, 1, begin:end], locked, atol=1e-4), "the concept's token is o*, gated"


def test_weights_by_block_reach_their_layers_only(tiny: TinyParts) -> None:
    adapter = kv_deltas(tiny.base.layout)
    weight = BlockWeights((("mid_block", 1.0),))
    side = compose_text_side([(adapter, weight)], tiny.factors)
    stage = CrossStage(tiny.base, tiny.factors)
    context = contexts(tiny, 1)
    out, plain = (stage.project(context, context, edits) for edits in (side.edits, CrossEdits()))
    for name, (begin, end) in stage.layout.spans.items():
        same = torch.allclose(out[..., begin:end], plain[..., begin:end], atol=1e-6)
        assert same != name.startswith("mid_block"), name


def test_each_layer_and_side_sees_its_own_context(tiny: TinyParts) -> None:
    stage = CrossStage(tiny.base, tiny.factors)
    layers = len(stage.layout.attentions)
    keys, values = contexts(tiny, layers, 2), contexts(tiny, layers, 2).flip(0) * 2
    out = stage.project(keys, values, CrossEdits())
    for number, attention in enumerate(stage.layout.attentions):
        for part, context in (("to_k", keys), ("to_v", values)):
            begin, end = stage.layout.spans[f"{attention}.{part}"]
            alone = stage.project(context[number], context[number], CrossEdits())
            assert torch.equal(out[..., begin:end], alone[..., begin:end])


def test_half_precision_bases_are_projected_in_fp32(tiny: TinyParts) -> None:
    unet = tiny_unet(tiny.base.unet.config)
    unet.load_state_dict(tiny.base.unet.state_dict())
    half = CrossStage(replace(tiny.base, unet=unet.half()), tiny.factors)
    context = contexts(tiny, 1)
    found = half.project(context, context, CrossEdits())
    assert found.dtype == torch.float32
    name, (begin, end) = next(iter(half.layout.spans.items()))
    weight = tiny.base.unet.get_parameter(f"{name}.weight").half().float()
    assert torch.allclose(found[..., begin:end], context @ weight.T, atol=1e-6)
