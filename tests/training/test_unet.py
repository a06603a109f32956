"""The UNet in training: contexts by layer, attention beside the fused one, activations computed again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_training import make_pair_spec, make_spec, make_task, make_tiny_unet
from torch import Tensor

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.loop import batch_loss, draw_batch
from hueshift.training.methods.learnable import Rows
from hueshift.training.methods.make import make_learnable
from hueshift.training.spec import Method, TrainingSpec
from hueshift.training.unet import TrainingUNet

Tiny = tuple[BaseModel, SpectralFactors]


def inputs(base: BaseModel, layers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 5, layers * base.layout.token_width, generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700]), context


def test_each_cross_attention_reads_its_own_part_of_a_wide_context(tiny: Tiny) -> None:
    base = tiny[0]
    attentions, width = base.layout.cross_attentions, base.layout.token_width
    unet = make_tiny_unet(*tiny, make_spec(Method.TEXTUAL_INVERSION))
    sample, steps, wide = inputs(base, len(attentions))
    seen: dict[str, Tensor] = {}
    handles = []
    for name in attentions:
        module = base.unet.get_submodule(name)

        def give(_: Any, args: Any, named: dict[str, Any], *, name: str = name) -> Any:
            begin = width * attentions.index(name)
            seen[name] = wide[..., begin : begin + width]
            return args, {**named, "encoder_hidden_states": seen[name]}

        handles.append(module.register_forward_pre_hook(give, with_kwargs=True))
    try:
        with torch.no_grad():
            expected = base.unet(sample, steps, encoder_hidden_states=wide[..., :width]).sample
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        assert torch.allclose(unet(sample, steps, wide, Rows()), expected, atol=2e-5)
        same = wide[..., :width].repeat(1, 1, len(attentions))
        plain = base.unet(sample, steps, encoder_hidden_states=wide[..., :width]).sample
        assert torch.allclose(unet(sample, steps, same, Rows()), plain, atol=2e-5)
        assert not torch.allclose(plain, expected, atol=1e-3)


def test_attention_is_what_the_layer_itself_would_compute(tiny: Tiny) -> None:
    base = tiny[0]
    unet = make_tiny_unet(*tiny, make_spec(Method.TEXTUAL_INVERSION))
    sample, steps, context = inputs(base)
    name = base.layout.cross_attentions[0]
    module: Any = base.unet.get_submodule(name)
    hidden: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args, named: hidden.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        base.unet(sample, steps, encoder_hidden_states=context)
        handle.remove()
        query = module.head_to_batch_dim(module.to_q(hidden[0]))
        key = module.head_to_batch_dim(module.to_k(context))
        expected = module.get_attention_scores(query, key).unflatten(0, (2, module.heads))
        with unet.watching([name], [1]) as maps:
            unet(sample, steps, context, Rows())
    assert list(maps) == [name]
    assert list(maps[name]) == [1]
    assert torch.allclose(maps[name][1], expected[1], atol=1e-5)
    assert torch.allclose(maps[name][1].sum(-1), torch.ones(()), atol=1e-5)


SPECS = [
    make_spec(Method.SVDIFF, anchor_below=0, caption_dropout=0.0),
    make_spec(Method.LORA, anchor_below=0, caption_dropout=0.0),
    make_spec(Method.DREAMBOOTH, anchor_below=0, caption_dropout=0.0),
    make_spec(Method.TEXTUAL_INVERSION, per_layer=True, caption_dropout=0.0),
    make_pair_spec(cut_mix_probability=0.9, unmix_weight=5.0, caption_dropout=0.0),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.method}-{len(spec.subjects)}")
def test_checkpointing_changes_no_loss_and_no_gradient(tiny: Tiny, spec: TrainingSpec) -> None:
    found = []
    for checkpointing in (False, True):
        task, state = make_task(*tiny, replace(spec, gradient_checkpointing=checkpointing))
        # Away from zero, where half of LoRA's gradients vanish.
        generator = torch.Generator().manual_seed(9)
        values = {
            name: (value.detach() + 0.05 * torch.randn(value.shape, generator=generator)).requires_grad_()
            for name, value in state.values.items()
        }
        loss = batch_loss(task, values, draw_batch(task, state))
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.item(), {name: value.grad for name, value in values.items()}))
    (plain_loss, plain), (again_loss, again) = found
    assert plain_loss == again_loss
    for name, grad in plain.items():
        other = again[name]
        assert grad is not None
        assert other is not None
        assert torch.allclose(grad, other, rtol=1e-4, atol=1e-6 * float(grad.abs().max())), name
        assert grad.abs().max() > 0


@pytest.mark.parametrize("method", [Method.SVDIFF, Method.LORA, Method.CUSTOM_DIFFUSION])
def test_weights_held_in_bfloat16_give_what_autocast_gives(tiny: Tiny, method: Method) -> None:
    base, factors = tiny
    spec = make_spec(method)
    learnable = make_learnable(spec, base, factors)
    rows = learnable.rows(learnable.initial(torch.Generator().manual_seed(1)))
    made = []
    for lowered in (False, True):
        adapted = AdaptedUNet(base, factors, learnable.layout, learnable.plan)
        made.append(TrainingUNet(adapted, base.layout.cross_attentions, base.layout.token_width, lowered=lowered))
    plain, low = made
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain(*inputs(base), rows)
        # Outside of autocast too: pictures are drawn so.
        found = low(*inputs(base), rows)
    assert found.dtype is expected.dtype is torch.bfloat16
    assert torch.equal(found, expected)
    assert all(parameter.dtype is torch.float32 for parameter in base.unet.parameters())
    held = {parameter.dtype for parameter in low._unet.parameters() if parameter.dim() > 1}
    assert held == {torch.bfloat16}


def operations(tensor: Tensor) -> set[str]:
    """Names of all that torch goes back through."""
    found: set[str] = set()
    left: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node.name())
            left += [function for function, _ in node.next_functions]
    return found


def test_repeated_pixels_are_nearest_neighbours(tiny: Tiny) -> None:
    spec = make_spec()
    unet, learnable = make_tiny_unet(*tiny, spec), make_learnable(spec, *tiny)
    sample, steps, context = inputs(tiny[0])
    context.requires_grad_()
    outputs, names = [], []
    gradients: list[Tensor] = []
    for _ in range(2):
        outputs.append(unet(sample, steps, context, learnable.base_rows()))
        names.append(operations(outputs[-1]))
        gradients += torch.autograd.grad([outputs[-1].square().sum()], [context])
        # A second time it must not repeat them again.
        unet.repeat_pixels()
        unet.repeat_pixels()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))
    assert [any("Upsample" in name for name in found) for found in names] == [True, False]


def test_pixels_are_repeated_to_an_odd_size_too(tiny: Tiny) -> None:
    unet, rows = make_tiny_unet(*tiny, make_spec(Method.LORA, rank=1)), Rows()
    sample = torch.randn(1, 4, 10, 7, generator=torch.Generator().manual_seed(2))
    _, steps, context = inputs(tiny[0])
    with torch.no_grad():
        before = unet(sample, steps[:1], context[:1], rows)
        unet.repeat_pixels()
        assert torch.equal(unet(sample, steps[:1], context[:1], rows), before)
