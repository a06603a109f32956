"""Jobs of svdiff that shift the text encoder too: what learns, what is served, and that nothing else changes."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Recorder, make_pair_spec, make_pictures, make_spec, make_task
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import Cancelled, InvalidArgument
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import make_conditioner
from hueshift.engines.cross_attention import CrossStage
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.training.cost import SpeedBook
from hueshift.training.defaults import TEXT_ENCODER_RATE, method_defaults
from hueshift.training.loop import batch_loss, draw_batch, train_step
from hueshift.training.methods.encoder_shifts import NORM, SIGMA, make_encoder_shifts
from hueshift.training.plateau import fixed_loss
from hueshift.training.run import TrainingResult, run_training
from hueshift.training.sharing.family import family_of
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.spec import Method, SubjectKind, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.words import Captions

Tiny = tuple[BaseModel, SpectralFactors]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tuned_spec(**given: Any) -> TrainingSpec:
    return make_spec(train_text_encoder=True, text_encoder_learning_rate=0.02, precision="fp32", **given)


def run(tiny: Tiny, spec: TrainingSpec, folder: Path, hooks: Recorder | None = None, **more: Any) -> TrainingResult:
    base, factors = tiny
    folder.mkdir(parents=True, exist_ok=True)
    pictures = make_pictures(len(spec.captions))
    given: dict[str, Any] = {"base": base, "factors": factors, "clip": None, "workdir": folder, **more}
    return run_training(spec, pictures, hooks=hooks or Recorder(), **given)


def learned(adapter: Adapter) -> dict[str, Tensor]:
    encoder = adapter.encoder
    return {**adapter.spectral, **adapter.norm, **adapter.tokens, **encoder.spectral, **encoder.norm}


def assert_same(one: TrainingResult, other: TrainingResult) -> None:
    assert one.losses == other.losses
    first, second = learned(one.adapter), learned(other.adapter)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def noise(values: Mapping[str, Tensor], size: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: size * torch.randn(value.shape, generator=generator) for name, value in values.items()}


def test_gradients_reach_the_shifts_and_nothing_of_the_base(tiny: Tiny) -> None:
    base, factors = tiny
    task, state = make_task(base, factors, tuned_spec(caption_dropout=0.0))
    assert {SIGMA, NORM, "sigma", "norm", "identifier"} == state.values.keys()
    torch.autograd.backward([batch_loss(task, state.values, draw_batch(task, state))])
    for name, value in state.values.items():
        assert value.grad is not None, name
        assert float(value.grad.abs().max()) > 0, name
    for part in (base.unet, base.text_encoder):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in part.parameters())


def test_a_gradient_is_what_differences_say(tiny: Tiny) -> None:
    """d loss / d delta by central differences, for the shift of one direction in each of two layers."""
    base, factors = tiny
    task, state = make_task(base, factors, tuned_spec(caption_dropout=0.0, anchor_below=0))
    batch = draw_batch(task, state)
    values = {name: value.detach().clone() for name, value in state.values.items()}
    values[SIGMA].requires_grad_()
    torch.autograd.backward([batch_loss(task, values, batch)])
    gradient = values[SIGMA].grad
    assert gradient is not None
    at = torch.zeros_like(gradient)
    for place in gradient.abs().topk(2).indices.tolist():
        at.zero_()[place] = 0.05
        with torch.no_grad():
            up, down = (
                float(batch_loss(task, {**values, SIGMA: values[SIGMA] + sign * at}, batch)) for sign in (1, -1)
            )
        assert (up - down) / 0.1 == pytest.approx(float(gradient[place]), rel=0.05)


def test_before_the_first_step_every_context_is_the_bases(tiny: Tiny) -> None:
    base, factors = tiny
    tuned, state = make_task(base, factors, tuned_spec())
    plain, _ = make_task(base, factors, make_spec())
    captions = ("a sks animal", "", "a sks animal", "a dog")
    found, expected = (task.captions.contexts(captions, state.values) for task in (tuned, plain))
    assert torch.allclose(found, expected, atol=1e-6), "the same but for the size of the batch"
    assert torch.equal(found[0], found[2])
    assert torch.equal(tuned.captions.contexts(captions, None), plain.captions.contexts(captions, None))


def test_a_job_learns_and_its_adapter_serves_what_it_trained(tiny: Tiny, tmp_path: Path) -> None:
    """Twelve steps lower the loss on fixed noise; the file of what they taught conditions as the training did."""
    base, factors = tiny
    spec = tuned_spec(steps=12)
    task, before_all = make_task(base, factors, spec)
    # Only the encoder is to move here.
    rates = {name: 0.02 * (name in (SIGMA, NORM)) for name in before_all.values}
    state = TrainingState(before_all.values, rates, torch.Generator().manual_seed(3), spec)
    before = fixed_loss(task, state)
    for _ in range(spec.steps):
        train_step(task, state, lambda _: None)
    assert fixed_loss(task, state) < 0.99 * before
    result = run(tiny, tuned_spec(steps=3, prior_weight=0.5, prior_images=1), tmp_path)
    adapter = read_adapter(write_adapter(result.adapter), base.layout, FileLimits())
    assert adapter.encoder.spectral.keys() == {layer.name for layer in base.layout.encoder_matrices}
    assert adapter.encoder.norm.keys() == {layer.name for layer in base.layout.encoder_norms}
    assert all(float(shift.abs().max()) > 0 for shift in learned(adapter).values())
    side = compose_text_side([(adapter, 1.0)], factors)
    prompts = ("", "a sks animal")
    served = make_conditioner(base, factors).condition(prompts, side, [500.0]).cross.at(0)
    values = flat_values(tiny, spec, adapter)
    encoder = make_encoder_shifts(base, factors, spec)
    context = Captions(base, TextStage(base), spec, encoder).contexts(prompts, values)
    expected = CrossStage(base, factors).project(context, context, side.edits)
    assert torch.allclose(served, expected, atol=1e-5)
    words = TextSide(side.words, side.edits)
    untuned = make_conditioner(base, factors).condition(prompts, words, [500.0]).cross.at(0)
    assert all(float((served[row] - untuned[row]).abs().max()) > 1e-3 for row in range(2))


def flat_values(tiny: Tiny, spec: TrainingSpec, adapter: Adapter) -> dict[str, Tensor]:
    layout, change = tiny[0].layout, adapter.encoder
    return {
        SIGMA: torch.cat([change.spectral[layer.name] for layer in layout.encoder_matrices]),
        NORM: torch.cat([change.norm[layer.name] for layer in layout.encoder_norms]),
        "identifier": adapter.tokens[spec.identifier][None],
    }


def test_a_stopped_job_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    spec = tuned_spec(steps=5, ema_decay=0.9, gradient_accumulation=2)
    whole = run(tiny, spec, tmp_path / "whole")
    with pytest.raises(Cancelled):
        run(tiny, spec, tmp_path / "parts", Recorder(stop_at=3))
    assert_same(run(tiny, spec, tmp_path / "parts"), whole)


def test_a_job_of_two_subjects_that_are_cut_and_mixed(tiny: Tiny, tmp_path: Path) -> None:
    spec = make_pair_spec(
        train_text_encoder=True, steps=3, prior_weight=0.5, prior_images=1, cut_mix_probability=0.6, unmix_weight=1.0
    )
    assert spec.text_encoder_learning_rate == TEXT_ENCODER_RATE
    adapter = run(tiny, spec, tmp_path).adapter
    assert set(adapter.tokens) == {"sks", "idk"}
    assert float(torch.cat(list(adapter.encoder.spectral.values())).abs().max()) > 0


def test_class_prompts_and_dropped_captions_go_through_the_tuned_encoder(tiny: Tiny) -> None:
    base, factors = tiny
    task, state = make_task(base, factors, tuned_spec())
    values = {**state.values, **noise({SIGMA: state.values[SIGMA]}, 0.1)}
    captions = ("", "an animal")
    plain, found = task.captions.contexts(captions, None), task.captions.contexts(captions, values).detach()
    assert all(float((found[row] - plain[row]).abs().max()) > 1e-2 for row in range(2))


def test_jobs_share_steps_with_those_whose_encoder_stays(tiny: Tiny, tmp_path: Path) -> None:
    """Each encodes its own captions, so the UNet's batch may hold both kinds."""
    base, factors = tiny
    specs = [tuned_spec(steps=3), make_spec(steps=3, precision="fp32")]
    assert len({family_of(spec) for spec in specs}) == 1
    alone = [run(tiny, spec, tmp_path / f"alone{number}") for number, spec in enumerate(specs)]
    sharing = SharedTraining(base, factors, patience=20.0)

    def together(number: int) -> TrainingResult:
        return run(tiny, specs[number], tmp_path / f"shared{number}", sharing=sharing)

    with ThreadPoolExecutor(2) as pool:
        shared = list(pool.map(together, range(2)))
    assert max(sharing.rounds) > 1
    for one, other in zip(shared, alone, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        first, second = learned(one.adapter), learned(other.adapter)
        assert first.keys() == second.keys()
        difference = torch.cat([(first[name] - second[name]).flatten() for name in first])
        whole = torch.cat([tensor.flatten() for tensor in second.values()])
        assert float(difference.norm() / whole.norm()) < 1e-3


def test_pictures_of_a_job_have_the_tuned_empty_prompt_beside_them(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hueshift.training import samples

    seen: list[Tensor] = []
    kept = samples.Sampler.pictures

    def pictures(sampler: samples.Sampler, *given: Any) -> Any:
        seen.append(sampler.empty)
        return kept(sampler, *given)

    monkeypatch.setattr(samples.Sampler, "pictures", pictures)
    base, factors = tiny
    adapter = run(tiny, tuned_spec(steps=3), tmp_path).adapter
    side = compose_text_side([(adapter, 1.0)], factors)
    served = make_conditioner(base, factors).condition([""], side, [500.0]).cross.at(0)
    assert torch.allclose(
        CrossStage(base, factors).project(seen[-1][None], seen[-1][None], side.edits), served, atol=1e-5
    )
    plain = TextStage(base).empty
    assert float((seen[-1] - plain).abs().max()) > 1e-3
    run(tiny, make_spec(steps=1), tmp_path / "plain")
    assert torch.equal(seen[-1], plain)


@pytest.mark.parametrize("method", [method for method in Method if method is not Method.SVDIFF])
def test_only_svdiff_has_shifts_of_it(method: Method) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make_spec(method, train_text_encoder=True)
    assert [violation.field for violation in caught.value.violations] == ["settings.train_text_encoder"]


def test_its_rate_counts_only_with_it(tiny: Tiny) -> None:
    """Clients may send back the defaults that they were told, so a rate without the switch is no error."""
    assert make_encoder_shifts(*tiny, make_spec(text_encoder_learning_rate=0.5)) is None
    told = method_defaults(Method.SVDIFF, SubjectKind.SUBJECT)
    assert (told["train_text_encoder"], told["text_encoder_learning_rate"]) == (False, TEXT_ENCODER_RATE)
    for wrong in (0.0, 1.5):
        with pytest.raises(InvalidArgument, match="text_encoder_learning_rate"):
            make_spec(train_text_encoder=True, text_encoder_learning_rate=wrong)
    spec = make_spec(train_text_encoder=True)
    assert TrainingSpec.from_json(spec.to_json()) == spec
    old = {name: value for name, value in spec.to_json().items() if "text_encoder" not in name}
    assert not TrainingSpec.from_json(old).train_text_encoder


def test_norms_keep_their_proportion(tiny: Tiny) -> None:
    base, factors = tiny
    spec = make_spec(
        train_text_encoder=True, learning_rate=0.01, norm_learning_rate=0.002, text_encoder_learning_rate=0.05
    )
    encoder = make_encoder_shifts(base, factors, spec)
    assert encoder is not None
    assert encoder.rates == {SIGMA: 0.05, NORM: pytest.approx(0.01)}
    assert make_encoder_shifts(base, factors, make_spec()) is None


def test_its_jobs_are_estimated_by_their_own_pace(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speeds.json")
    book.record("b" * 64, make_spec(), 10, 10.0)
    tuned = make_spec(train_text_encoder=True)
    assert book.estimate("b" * 64, tuned) is None
    book.record("b" * 64, tuned, 10, 15.0)
    found = book.estimate("b" * 64, tuned)
    assert found is not None
    assert found.seconds_per_step == pytest.approx(1.5)
