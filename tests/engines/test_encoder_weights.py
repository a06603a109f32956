"""Tuned text encoders in serving: the truth in fp64, exact at nothing, put together once for each content."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoder_adapters import encoder_adapter, tune_encoders
from residency_log import ResidencyLog
from text_side_adapters import mapper
from tiny_sdxl import save_tiny_sdxl, sdxl_parts
from tiny_training import make_tiny_base
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, EncoderChange
from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.conditioning import Conditioner, make_conditioner
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.encoder_weights import EncoderAssembly, EncoderWeights, compose_encoder
from hueshift.engines.residency_tiers import Tier
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.svd_cache import EncoderFactors, SpectralFactors, encoder_factors_file, load_factors
from hueshift.engines.text import TextStage
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.engines.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (AdapterKind.SPECTRAL, AdapterKind.LOWRANK)
# fp32 through four layers, keys and values of order 1; seen: 3e-6.
CLOSE = 3e-5
# The usual negative prompt, whose encoding the base keeps, and another.
PROMPTS = ("", "a red fox")


@pytest.fixture(scope="module")
def factors(base_model: BaseModel, cache_dir: Path) -> SpectralFactors:
    return load_factors(base_model, cache_dir)


@pytest.fixture(scope="module")
def conditioner(base_model: BaseModel, factors: SpectralFactors) -> Conditioner:
    return make_conditioner(base_model, factors)


def cross(conditioner: Conditioner, factors: SpectralFactors, *mix: tuple[Adapter, float]) -> Tensor:
    return conditioner.condition(PROMPTS, compose_text_side(mix, factors), [500.0]).cross.at(0)


def assert_near(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    assert torch.allclose(found, expected, atol=CLOSE)
    assert float((found - plain).abs().max()) > 100 * CLOSE, "the adapter must change something"


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_is_encoded_by_the_tuned_encoder(
    base_model: BaseModel, conditioner: Conditioner, factors: SpectralFactors, kind: AdapterKind
) -> None:
    adapter = encoder_adapter(base_model.layout, kind=kind)
    truth = make_conditioner(tune_encoders(base_model, (adapter, 0.7)), factors)
    plain, expected = cross(conditioner, factors), cross(truth, factors)
    found = cross(conditioner, factors, (adapter, 0.7))
    for row in range(2):
        assert_near(found[row], expected[row], plain[row])
    assert torch.equal(cross(conditioner, factors), plain), "the base's own weights must be as they were"


def test_adapters_add_up_before_the_relu(
    base_model: BaseModel, conditioner: Conditioner, factors: SpectralFactors
) -> None:
    layout = base_model.layout
    mix = [(encoder_adapter(layout, 0), 0.5), (encoder_adapter(layout, 1), -0.8)]
    mix.append((encoder_adapter(layout, 2, AdapterKind.LOWRANK), 1.0))
    truth = make_conditioner(tune_encoders(base_model, *mix), factors)
    assert_near(cross(conditioner, factors, *mix), cross(truth, factors), cross(conditioner, factors))


def test_nothing_learned_is_the_base_to_the_bit(base_model: BaseModel, factors: SpectralFactors) -> None:
    adapter = encoder_adapter(base_model.layout)
    zeros = {name: torch.zeros_like(shift) for name, shift in adapter.encoder.spectral.items()}
    none = Adapter(AdapterKind.SPECTRAL, base_model.base_hash, "svdiff", encoder=EncoderChange(zeros))
    assert compose_encoder([(none, 1.0), (adapter, 0.5), (adapter, -0.5)]).key == ""
    text = TextStage(base_model)
    rows = [text.tokenize(prompt, {}) for prompt in PROMPTS]
    made = EncoderAssembly(base_model, factors.encoder).put_together(zeros, {}, {})
    assert len(made[0]) == len(zeros)
    assert torch.equal(text.encode_rows(rows, [{}] * 2, made), text.encode_rows(rows, [{}] * 2))


def test_a_layer_is_what_the_formula_says(base_model: BaseModel, factors: SpectralFactors) -> None:
    """W + U diag(relu(sigma + delta) - sigma) V^T in fp64 by hand, with values pushed below zero."""
    assert factors.encoder is not None
    name, parts = "text_encoder.encoder.layers.0.mlp.fc2", factors.encoder()
    delta = torch.linspace(-3, 1, len(parts.sigma[name])) * parts.sigma[name]
    path = "encoder.layers.0.mlp.fc2.weight"
    made = EncoderAssembly(base_model, factors.encoder).put_together({name: delta}, {}, {})[0]
    found = next(weight for parameter, weight in made.items() if parameter.endswith(path))
    base = next(p for n, p in base_model.text_encoder.named_parameters() if n.endswith(path)).double()
    u, sigma, vh = (part[name].double() for part in (parts.u, parts.sigma, parts.vh))
    shifted = torch.tensor([max(s + d, 0.0) for s, d in zip(sigma.tolist(), delta.tolist(), strict=True)])
    assert int((shifted == 0).sum()) > 100
    expected = base + u @ torch.diag(shifted.double() - sigma) @ vh
    assert float((found.double() - expected).abs().max()) < 1e-5


def test_a_textual_bypass_meets_the_tuned_last_norm(
    base_model: BaseModel, conditioner: Conditioner, factors: SpectralFactors
) -> None:
    """NeTI's words change hidden states before the final norm, which is tuned as well."""
    word, adapter = mapper(base_model.layout), encoder_adapter(base_model.layout)
    prompts = [f"a {word.words[0]} fox"]

    def made(by: Conditioner, *adapters: Adapter) -> Tensor:
        side = compose_text_side([(adapter, 1.0) for adapter in adapters], factors)
        return by.condition(prompts, side, [500.0]).cross.at(0)

    truth = make_conditioner(tune_encoders(base_model, (adapter, 1.0)), factors)
    assert_near(made(conditioner, word, adapter), made(truth, word), made(conditioner, word))


@pytest.mark.parametrize("kind", KINDS)
def test_both_encoders_of_sdxl_are_tuned(tmp_path: Path, kind: AdapterKind) -> None:
    base = load_base_model(save_tiny_sdxl(tmp_path / "xl"))
    parts = sdxl_parts(base)
    adapter = encoder_adapter(parts.base.layout, kind=kind)
    changed = {name.partition(".")[0] for name in (*adapter.encoder.norm, *adapter.encoder.spectral)}
    assert changed == {"text_encoder", "text_encoder_2"}

    def made(by: BaseModel, *mix: tuple[Adapter, float]) -> Sequence[Tensor]:
        side = compose_text_side(mix, parts.factors)
        inputs = make_conditioner(by, parts.factors).condition(PROMPTS, side, [500.0]).cross
        added = inputs.added_at(0)
        assert added is not None
        return inputs.at(0), added

    truth = made(tune_encoders(parts.base, (adapter, 1.0)))
    for found, expected, plain in zip(made(parts.base, (adapter, 1.0)), truth, made(parts.base), strict=True):
        assert_near(found, expected, plain)


def test_one_content_is_put_together_once_whoever_asks(base_model: BaseModel, factors: SpectralFactors) -> None:
    log = ResidencyLog()
    weights = EncoderWeights(base_model, factors.encoder, observer=log)
    adapter = encoder_adapter(base_model.layout)
    barrier = threading.Barrier(4)

    def ask(_: int) -> object:
        edits = compose_encoder([(adapter, 1.0)])
        barrier.wait(10)
        return weights.get(edits)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(ask, range(4)))
    assert all(found is made[0] for found in made)
    assert log.counts[f"{Tier.ENCODER} loads"] == 1
    assert weights.get(compose_encoder([(adapter, 0.5)])) is not made[0]
    assert weights.get(compose_encoder([])) == ()


def test_what_was_used_least_recently_goes_first(base_model: BaseModel, factors: SpectralFactors) -> None:
    edits = [compose_encoder([(encoder_adapter(base_model.layout, seed), 1.0)]) for seed in range(3)]
    one = EncoderWeights(base_model, factors.encoder)
    first = one.get(edits[0])
    size = one.nbytes
    weights = EncoderWeights(base_model, factors.encoder, max_bytes=2 * size)
    kept = [weights.get(edit) for edit in edits[:2]]
    assert weights.get(edits[0]) is kept[0]
    weights.get(edits[2])
    assert weights.nbytes == 2 * size
    assert weights.get(edits[0]) is kept[0]
    again = weights.get(edits[1])
    assert again is not kept[1]
    assert all(torch.equal(again[0][name], tensor) for name, tensor in kept[1][0].items())
    tight = EncoderWeights(base_model, factors.encoder, max_bytes=size - 1)
    assert all(torch.equal(tight.get(edits[0])[0][name], tensor) for name, tensor in first[0].items())
    assert tight.nbytes == 0


def test_the_decomposition_waits_for_an_adapter_and_is_kept(base_model: BaseModel, tmp_path: Path) -> None:
    file = encoder_factors_file(tmp_path, base_model.base_hash)
    weights = EncoderWeights(base_model, EncoderFactors(base_model, file))
    weights.get(compose_encoder([(encoder_adapter(base_model.layout, kind=AdapterKind.LOWRANK), 1.0)]))
    assert not file.exists()
    spectral = compose_encoder([(encoder_adapter(base_model.layout), 1.0)])
    made = weights.get(spectral)
    written = file.stat().st_mtime_ns
    again = EncoderWeights(base_model, EncoderFactors(base_model, file)).get(spectral)
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(again[0][name], tensor) for name, tensor in made[0].items())


def test_two_users_and_the_base_in_one_batch(base_model: BaseModel) -> None:
    """Each with its own UNet row and its own text encoder: every picture as it is alone."""
    base, factors = make_tiny_base(base_model)
    rows = RowLayout(base.layout, (), 1, text_side=False)
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    engine = TorchEngine(base, factors, rows, norms, slots=3, max_batch=8, device=torch.device("cpu"))
    conditioner, table = make_conditioner(base, factors), make_table(base.schedule, SamplerKind.DDIM, 2)
    draw = torch.Generator().manual_seed(1)
    users: list[Adapter] = []
    for slot in (1, 2):
        shifts = {m.name: 0.3 * torch.randn(m.rank, generator=draw) for m in base.layout.matrices}
        users.append(replace(encoder_adapter(base.layout, slot), spectral=shifts))
        engine.load_row(slot, rows.compose([(users[-1], 1.0)], factors, norms))

    def sample(slot: int, *, tuned: bool = True) -> Sample:
        mix = [(users[slot - 1] if tuned else replace(users[slot - 1], encoder=EncoderChange()), 1.0)] if slot else []
        cross = conditioner.condition(PROMPTS, compose_text_side(mix, factors), table.timesteps.tolist()).cross
        return start_sample(slot, (4, 8, 8), cross=cross, guidance=3.0, table=table, slot=slot, needs_factored=slot > 0)

    together, alone = ([sample(slot) for slot in range(3)] for _ in range(2))
    while any(not one.done for one in together):
        advance(engine, together)
    for one, other in zip(together, alone, strict=True):
        while not other.done:
            advance(engine, [other])
        assert torch.allclose(one.latents, other.latents, atol=1e-4)
    plain = sample(1, tuned=False)
    while not plain.done:
        advance(engine, [plain])
    assert float((plain.latents - alone[1].latents).abs().max()) > 1e-2, "the tuned encoder must change the picture"


def test_a_request_does_not_see_anothers_adapter(
    base_model: BaseModel, conditioner: Conditioner, factors: SpectralFactors
) -> None:
    """Requests of two users and of the base, encoded at once in threads, as each alone."""
    mixes = [[(encoder_adapter(base_model.layout, seed), 1.0)] for seed in range(2)]
    sides = [TextSide(), *(compose_text_side(mix, factors) for mix in mixes)]

    def made(number: int) -> Tensor:
        return conditioner.condition(PROMPTS, sides[number % 3], [500.0]).cross.at(0)

    alone = [made(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(made, range(12)))
    assert all(torch.equal(found, alone[number % 3]) for number, found in enumerate(together))
