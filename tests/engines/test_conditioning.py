"""What each step's cross-attention reads, for words that change with step and layer: against the papers' equations."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from plain_text import encode_hidden, encode_taught
from text_side_adapters import gated, kv_deltas, layer_tokens, mapper, multi_vector, stage_tokens
from torch import Tensor

from hueshift.adapters.adapter import Adapter, TokenMapper
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import Conditioner, Conditioning, make_conditioner
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.svd_cache import SpectralFactors, load_factors
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.engines.torch_engine import TorchEngine

CLOSE = 2e-5
# DDIM's timesteps for eight steps of 1000: two in each quarter.
TIMESTEPS = (937.5, 812.5, 687.5, 562.5, 437.5, 312.5, 187.5, 62.5)


@pytest.fixture(scope="module")
def factors(base_model: BaseModel, cache_dir: object) -> SpectralFactors:
    return load_factors(base_model, cache_dir)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def conditioner(base_model: BaseModel, factors: SpectralFactors) -> Conditioner:
    return make_conditioner(base_model, factors)


@pytest.fixture(scope="module")
def conditions(conditioner: Conditioner, factors: SpectralFactors) -> "Conditions":
    return Conditions(conditioner, factors)


class Conditions:
    """Conditions prompts on mixes of adapters."""

    def __init__(self, conditioner: Conditioner, factors: SpectralFactors) -> None:
        self.conditioner, self.factors = conditioner, factors

    def __call__(
        self, prompts: Sequence[str], *adapters: Adapter, timesteps: Sequence[float] = TIMESTEPS
    ) -> Conditioning:
        side = compose_text_side([(adapter, 1.0) for adapter in adapters], self.factors)
        return self.conditioner.condition(prompts, side, timesteps)


def project(base: BaseModel, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Keys and values [tokens, width] of contexts [tokens, width], one for each layer, by diffusers' own layers."""
    parts: list[Tensor] = []
    for number, attention in enumerate(CrossLayout(base.layout).attentions):
        module = base.unet.get_submodule(attention)
        parts += [module.to_k(keys[number]), module.to_v(values[number])]  # type: ignore[operator]
    return torch.cat(parts, -1)


def same(base: BaseModel, context: Tensor) -> Tensor:
    contexts = [context] * len(CrossLayout(base.layout).attentions)
    return project(base, contexts, contexts)


def test_plain_prompts_are_projected_once(base_model: BaseModel, conditions: Conditions) -> None:
    made = conditions(["", "a red fox"])
    assert len(made.cross.stages) == 1
    assert made.cross.stage_of == ()
    assert made.truncated == (0, 0)
    for row, prompt in enumerate(("", "a red fox")):
        expected = same(base_model, encode_taught(base_model, torch.zeros(0, base_model.layout.token_width), prompt))
        assert all(torch.allclose(made.cross.at(step)[row], expected, atol=CLOSE) for step in range(8))


def test_a_prompt_without_the_word_is_projected_once(base_model: BaseModel, conditions: Conditions) -> None:
    every = [stage_tokens(base_model.layout), layer_tokens(base_model.layout), mapper(base_model.layout)]
    made, plain = conditions(["a red fox"], *every), conditions(["a red fox"])
    assert len(made.cross.stages) == 1
    assert torch.equal(made.cross.stages[0], plain.cross.stages[0])


@pytest.mark.parametrize("vectors", [1, 2])
def test_p_plus_encodes_the_prompt_once_for_each_layer(
    base_model: BaseModel, conditions: Conditions, vectors: int
) -> None:
    """Voynov et al. 2023, section 3: layer l sees the prompt with the l-th vectors in the word's place."""
    adapter = layer_tokens(base_model.layout, vectors=vectors)
    made = conditions(["", "a <layers> fox"], adapter)
    grid = adapter.token_grids["<layers>"][0]
    contexts = [encode_taught(base_model, grid[number], "a", vectors, "fox") for number in range(len(grid))]
    assert len(made.cross.stages) == 1
    assert torch.allclose(made.cross.at(0)[1], project(base_model, contexts, contexts), atol=CLOSE)
    empty = encode_taught(base_model, grid[0, :0], "")
    assert torch.allclose(made.cross.at(0)[0], same(base_model, empty), atol=CLOSE)
    assert float((contexts[0] - contexts[1]).abs().max()) > 100 * CLOSE, "the layers' contexts must differ"


@pytest.mark.parametrize("layers", [False, True])
def test_prospect_changes_at_its_stages(base_model: BaseModel, conditions: Conditions, layers: bool) -> None:
    """Zhang et al. 2023, section 3.2: equal parts of the timesteps, first at high noise."""
    adapter = stage_tokens(base_model.layout, stages=4, layers=layers)
    made = conditions(["a <stages> fox"], adapter)
    grid = adapter.token_grids["<stages>"]
    assert made.cross.stage_of == (0, 0, 1, 1, 2, 2, 3, 3)
    count = len(CrossLayout(base_model.layout).attentions)
    for step in range(8):
        stage = grid[step // 2].expand(count, -1, -1)
        contexts = [encode_taught(base_model, stage[number], "a", 1, "fox") for number in range(count)]
        assert torch.allclose(made.cross.at(step)[0], project(base_model, contexts, contexts), atol=CLOSE)


def test_stages_have_equal_shares_of_all_timesteps(base_model: BaseModel, conditions: Conditions) -> None:
    steps = tuple(float(t) for t in range(999, -1, -1))
    of = conditions(["<stages>"], stage_tokens(base_model.layout, stages=10), timesteps=steps).cross.stage_of
    assert [of.count(stage) for stage in range(10)] == [100] * 10
    assert all(one <= other for one, other in pairwise(of))


def test_stages_that_no_step_reaches_are_not_made(base_model: BaseModel, conditions: Conditions) -> None:
    adapter = stage_tokens(base_model.layout, stages=4)
    made = conditions(["<stages>"], adapter, timesteps=(900.0, 100.0))
    assert len(made.cross.stages) == 2
    assert made.cross.stage_of == (0, 1)
    last = encode_taught(base_model, adapter.token_grids["<stages>"][3, 0], 1)
    assert torch.allclose(made.cross.at(1)[0], same(base_model, last), atol=CLOSE)


def neti(word: TokenMapper, t: float, layer: float) -> tuple[Tensor, Tensor]:
    """Alaluf et al. 2023, section 4.1, number by number in fp64: the embedding and the bypass (empty if there is none).

    Fourier features of (t, l), hidden layers of linear, layer norm and leaky ReLU, and a linear one scaled to length.
    """
    features = [2 * math.pi * (float(f) * t + float(g) * layer) for f, g in word.frequencies]
    x = torch.tensor([math.cos(f) for f in features] + [math.sin(f) for f in features], dtype=torch.float64)
    for hidden in word.layers:
        x = hidden.weight.double() @ x + hidden.bias.double()
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        x = x * hidden.norm_weight.double() + hidden.norm_bias.double()
        x = torch.where(x > 0, x, 0.01 * x)
    out = word.output_weight.double() @ x + word.output_bias.double()
    out = out / out.square().sum().sqrt() * word.norm
    width = len(out) // 2 if word.bypass else len(out)
    return out[:width].float(), out[width:].float()


@pytest.mark.parametrize("bypass", [False, True])
def test_neti_maps_timestep_and_layer(base_model: BaseModel, conditions: Conditions, bypass: bool) -> None:
    """Keys see the word's embedding; values see the textual bypass added before the final layer norm too."""
    adapter = mapper(base_model.layout, bypass=bypass)
    word = adapter.mappers["<mapped>"]
    made = conditions(["", "a <mapped> fox"], adapter)
    assert made.cross.stage_of == tuple(range(8))
    layers = len(CrossLayout(base_model.layout).attentions)
    norm = next(m for n, m in base_model.text_encoder.named_modules() if n.endswith("final_layer_norm"))
    for step in (0, 5):
        keys, values = [], []
        for layer in range(layers):
            embedding, vector = neti(word, TIMESTEPS[step] / 1000, layer / layers)
            context, hidden = encode_hidden(base_model, embedding[None], "a", 1, "fox")
            if bypass:
                # The word's place: after the start mark and "a".
                e = hidden[2]
                hidden[2] = e + word.bypass * e.norm() * vector / vector.norm()
            keys.append(context)
            values.append(norm(hidden))
        assert torch.allclose(made.cross.at(step)[1], project(base_model, keys, values), atol=CLOSE)
    empty = encode_taught(base_model, torch.zeros(0, base_model.layout.token_width), "")
    assert torch.allclose(made.cross.at(3)[0], same(base_model, empty), atol=CLOSE)


def test_words_of_several_kinds_in_one_prompt(base_model: BaseModel, conditions: Conditions) -> None:
    layout = base_model.layout
    many, layered, staged = multi_vector(layout, vectors=2), layer_tokens(layout), stage_tokens(layout, stages=4)
    made = conditions(["<art> <layers> <stages>"], many, layered, staged)
    for step in range(8):
        contexts = [
            encode_taught(
                base_model,
                torch.cat([many.tokens["<art>"], by_layer, staged.token_grids["<stages>"][step // 2, 0]]),
                4,
            )
            for by_layer in layered.token_grids["<layers>"][0]
        ]
        assert torch.allclose(made.cross.at(step)[0], project(base_model, contexts, contexts), atol=CLOSE)


def test_a_mixed_batch_of_all_kinds_equals_each_alone(
    base_model: BaseModel, conditions: Conditions, factors: SpectralFactors
) -> None:
    layout = base_model.layout
    rows = RowLayout(layout, (), 4, text_side=False)
    norms = read_norms(layout, lambda name: base_model.unet.get_parameter(f"{name}.weight"))
    engine = TorchEngine(base_model, factors, rows, norms, slots=2, max_batch=16, device=torch.device("cpu"))
    kinds: list[Callable[..., Adapter]] = [multi_vector, layer_tokens, stage_tokens, mapper, kv_deltas, gated]
    table = make_table(base_model.schedule, SamplerKind.DDIM, 3)
    times = [float(t) for t in table.timesteps]

    def sample(number: int) -> Sample:
        adapter = kinds[number](layout, seed=number)
        made = conditions(["", f"a {adapter.identifier} fox"], adapter, timesteps=times)
        return start_sample(number, (4, 8, 8), cross=made.cross, guidance=4.0, table=table)

    together, alone = ([sample(number) for number in range(len(kinds))] for _ in range(2))
    plain = start_sample(0, (4, 8, 8), cross=conditions(["", "a fox"]).cross, guidance=4.0, table=table)
    # One is a step ahead, as samples that came earlier are.
    advance(engine, together[3:4])
    while any(not one.done for one in together):
        advance(engine, [one for one in together if not one.done])
    for one, other in zip(together, alone, strict=True):
        while not other.done:
            advance(engine, [other])
        # Rounding in another order makes 1.4e-4 after three guided steps on one thread; another's word makes 4 to 12.
        assert torch.allclose(one.latents, other.latents, atol=5e-4)
    while not plain.done:
        advance(engine, [plain])
    assert float((plain.latents - alone[0].latents).abs().max()) > 1e-2, "the word must matter"


def test_an_empty_side_is_the_base(base_model: BaseModel, conditioner: Conditioner, conditions: Conditions) -> None:
    made = conditioner.condition(["a fox"], TextSide(), (500.0,))
    assert torch.equal(made.cross.stages[0], conditions(["a fox"]).cross.stages[0])
