"""Whole runs on the tiny base model: deterministic, resumable bit for bit, stoppable, and honest about divergence."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_training import SECOND_WORD, Recorder, make_pair_spec, make_pictures, make_spec
from torch import Tensor, nn

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import Cancelled, HueshiftError, InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import Conditioner
from hueshift.engines.cross_attention import CrossStage
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.text_side import compose_text_side
from hueshift.training.divergence import check_finite
from hueshift.training.run import CHECKPOINT_FILE, CLASS_FOLDER, TrainingResult, run_training
from hueshift.training.spec import Method, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.words import Captions

Tiny = tuple[BaseModel, SpectralFactors]


def run(tiny: Tiny, spec: TrainingSpec, workdir: Path, hooks: Recorder | None = None) -> TrainingResult:
    base, factors = tiny
    pictures = make_pictures(len(spec.captions))
    return run_training(
        spec, pictures, base=base, factors=factors, clip=None, workdir=workdir, hooks=hooks or Recorder()
    )


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    named = {f"spectral/{name}": shift for name, shift in adapter.spectral.items()}
    named |= {f"norm/{name}": shift for name, shift in adapter.norm.items()}
    named |= {f"a/{name}": factors.a for name, factors in adapter.lowrank.items()}
    named |= {f"b/{name}": factors.b for name, factors in adapter.lowrank.items()}
    named |= {f"kv/{name}": delta for name, delta in adapter.kv.items()}
    named |= {f"dense/{name}": delta for name, delta in adapter.dense.items()}
    named |= {f"grid/{word}": grid for word, grid in adapter.token_grids.items()}
    return named | {f"token/{word}": embedding for word, embedding in adapter.tokens.items()}


def assert_same(a: TrainingResult, b: TrainingResult) -> None:
    assert a.losses == b.losses
    left, right = tensors_of(a.adapter), tensors_of(b.adapter)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("method", Method)
def test_a_run_reports_its_steps_and_leaves_the_base_as_it_was(tiny: Tiny, method: Method, tmp_path: Path) -> None:
    base = tiny[0]
    parts = (base.unet, base.text_encoder, base.vae)
    before = [weights_of(part) for part in parts]
    hooks = Recorder()
    result = run(tiny, make_spec(method, sample_interval=4), tmp_path, hooks)
    for part, old in zip(parts, before, strict=True):
        new = part.state_dict()
        assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
        assert all(parameter.grad is None for parameter in part.parameters())
    assert hooks.steps == [1, 2, 3, 4, 5, 6]
    assert tuple(hooks.losses) == result.losses
    assert hooks.checkpoints == [2, 4, 6]
    assert hooks.points == ["mid-step", "mid-step", "checkpoint-written"] * 3
    assert [(step, prompt) for step, prompt, _ in hooks.samples] == [
        (4, make_spec().captions[0]),
        (6, make_spec().captions[0]),
    ]
    assert Image.open(io.BytesIO(hooks.samples[-1][2])).size == (base.pixels, base.pixels)
    learned = tensors_of(result.adapter)
    assert result.adapter.tokens["sks"].shape == (make_spec(method).token_vectors, base.layout.token_width)
    changed = [name for name, tensor in learned.items() if tensor.abs().max() > 0]
    assert len(changed) == len(learned)


@pytest.mark.parametrize(("method", "rank"), [*((method, None) for method in Method), (Method.DREAMBOOTH, 0)])
def test_a_stopped_run_goes_on_bit_for_bit(tiny: Tiny, method: Method, rank: int | None, tmp_path: Path) -> None:
    given: dict[str, Any] = {"prior_weight": 0.5, "prior_images": 3} if method is Method.SVDIFF else {}
    if method is Method.DREAMBOOTH:
        given = {"targets": ("attn1.to_q", "attn2.to_k", "conv_in"), "rank": rank}
    spec = make_spec(method, ema_decay=0.9, gradient_accumulation=2, random_crops=2, offset_noise=0.1, **given)
    whole = run(tiny, spec, tmp_path / "whole")
    parts = tmp_path / "parts"
    for stop_at in (1, 4):
        with pytest.raises(Cancelled):
            run(tiny, spec, parts, Recorder(stop_at=stop_at))
    hooks = Recorder()
    assert_same(run(tiny, spec, parts, hooks), whole)
    assert hooks.steps == [5, 6]
    # And a run that had ended gives its result again without a step.
    again = Recorder()
    assert_same(run(tiny, spec, parts, again), whole)
    assert again.steps == []


def test_a_job_of_two_subjects_goes_on_bit_for_bit_and_teaches_both_words(tiny: Tiny, tmp_path: Path) -> None:
    spec = make_pair_spec(
        Method.LORA, cut_mix_probability=0.6, unmix_weight=1.0, prior_weight=0.5, prior_images=2, token_vectors=2
    )
    whole = run(tiny, spec, tmp_path / "whole")
    with pytest.raises(Cancelled):
        run(tiny, spec, tmp_path / "parts", Recorder(stop_at=3))
    assert_same(run(tiny, spec, tmp_path / "parts"), whole)
    width = tiny[0].layout.token_width
    assert {word: tuple(vectors.shape) for word, vectors in whole.adapter.tokens.items()} == {
        "sks": (2, width),
        SECOND_WORD: (2, width),
    }
    assert (whole.adapter.identifier, whole.adapter.class_noun) == ("sks", "animal")
    # Class pictures of both nouns.
    assert len(list((tmp_path / "whole" / CLASS_FOLDER).iterdir())) == 2


def test_words_by_layer_become_grids_that_serve_what_was_trained(tiny: Tiny, tmp_path: Path) -> None:
    base, factors = tiny
    spec = make_spec(Method.TEXTUAL_INVERSION, per_layer=True, token_vectors=2)
    result = run(tiny, spec, tmp_path)
    layers = len(base.layout.cross_attentions)
    grid = result.adapter.token_grids["sks"]
    assert (tuple(grid.shape), dict(result.adapter.tokens)) == ((1, layers, 2, base.layout.token_width), {})
    assert not torch.equal(grid[0, 0], grid[0, 1])
    text = TextStage(base)
    side = compose_text_side([(result.adapter, 1.0)], factors)
    cross = CrossStage(base, factors)
    served = Conditioner(base, text, cross).condition(["a sks animal"], side, [500.0]).cross.at(0)
    trained = Captions(base, text, spec).contexts(["a sks animal"], {"identifier": grid[0]})
    by_layer = torch.stack(trained.chunk(layers, dim=-1))
    assert torch.allclose(served, cross.project(by_layer, by_layer, side.edits), atol=1e-4)


def test_a_job_ends_on_a_plateau_and_stays_ended(tiny: Tiny, tmp_path: Path) -> None:
    # Without a learning rate worth the name nothing is gained: checks at 10 and 20 bring nothing after the first.
    spec = make_spec(steps=60, learning_rate=1e-12, identifier_learning_rate=0.0, early_stop=1, warmup_steps=0)
    hooks = Recorder()
    result = run(tiny, replace(spec, norm_learning_rate=0.0), tmp_path, hooks)
    assert len(result.losses) == 20
    assert hooks.checkpoints[-1] == 20
    again = Recorder()
    assert_same(run(tiny, replace(spec, norm_learning_rate=0.0), tmp_path, again), result)
    assert again.steps == []


def test_older_checkpoints_are_kept_and_stand_in_for_a_lost_one(tiny: Tiny, tmp_path: Path) -> None:
    spec = make_spec(checkpoint_limit=3, checkpoint_interval=1)
    whole = run(tiny, spec, tmp_path)
    names = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert names == ["checkpoint-000004.safetensors", "checkpoint-000005.safetensors", CHECKPOINT_FILE]
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"torn")
    hooks = Recorder()
    assert_same(run(tiny, spec, tmp_path, hooks), whole)
    assert hooks.steps == [6]


def test_a_result_tells_what_its_steps_took(tiny: Tiny, tmp_path: Path) -> None:
    result = run(tiny, make_spec(Method.TEXTUAL_INVERSION), tmp_path)
    assert result.steps_taken == 6
    assert result.step_seconds > 0
    assert run(tiny, make_spec(Method.TEXTUAL_INVERSION), tmp_path).steps_taken == 0


class Far:
    """A loss that a device takes a second for, and nothing else takes any time."""

    def __init__(self, clock: SimpleNamespace, loss: float) -> None:
        self.clock, self.loss = clock, loss

    def here(self) -> bool:
        """Not before it is waited for."""
        return False

    def value(self) -> float:
        """Wait for it."""
        self.clock.now += 1.0
        return self.loss


def test_what_is_waited_for_counts_as_the_steps_own_time(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("hueshift.training.run.time", SimpleNamespace(perf_counter=lambda: clock.now))
    far = partial(TrainingState, send=lambda parts: Far(clock, float(parts[0])))
    monkeypatch.setattr("hueshift.training.run.TrainingState", far)
    told: list[float] = []

    class Timed(Recorder):
        def on_step(self, step: int, loss: float, seconds: float) -> None:
            told.append(seconds)

    # More steps than may be underway, then a checkpoint that waits for all of them.
    result = run(tiny, make_spec(Method.TEXTUAL_INVERSION, steps=7, checkpoint_interval=7), tmp_path, Timed())
    assert (result.steps_taken, result.step_seconds) == (7, 7.0)
    assert (len(told), sum(told)) == (7, 7.0)


def test_masks_must_be_those_of_the_spec(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="masks of"):
        run(tiny, replace(make_spec(), masked_pictures=(1,)), tmp_path)


class _Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(point: str, step: int) -> Callable[[str, int], None]:
    def on_point(name: str, done: int) -> None:
        if (name, done) == (point, step):
            raise _Killed

    return on_point


@pytest.mark.parametrize(("point", "step", "resumed_at"), [("mid-step", 3, 3), ("checkpoint-written", 4, 5)])
def test_a_killed_run_goes_on_from_its_checkpoint_bit_for_bit(
    tiny: Tiny, tmp_path: Path, point: str, step: int, resumed_at: int
) -> None:
    whole = run(tiny, make_spec(), tmp_path / "whole")
    with pytest.raises(_Killed):
        run(tiny, make_spec(), tmp_path / "killed", Recorder(on_point=kill_at(point, step)))
    hooks = Recorder()
    assert_same(run(tiny, make_spec(), tmp_path / "killed", hooks), whole)
    assert hooks.steps[0] == resumed_at


def test_the_seed_decides_everything(tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = run(tiny, make_spec(), tmp_path / "1")
    torch.manual_seed(2)
    assert_same(run(tiny, make_spec(), tmp_path / "2"), first)
    assert run(tiny, make_spec(seed=8), tmp_path / "3").losses != first.losses


def test_a_checkpoint_of_another_job_is_not_continued(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, make_spec(seed=8), tmp_path)
    hooks = Recorder()
    assert_same(run(tiny, make_spec(), tmp_path, hooks), run(tiny, make_spec(), tmp_path / "fresh"))
    assert hooks.steps[0] == 1


def test_divergence_is_named_with_its_step(tiny: Tiny, tmp_path: Path) -> None:
    spec = replace(make_spec(), learning_rate=1e30, norm_learning_rate=1e30, warmup_steps=0)
    with pytest.raises(HueshiftError, match=r"at step 2.*learning_rate") as caught:
        run(tiny, spec, tmp_path)
    assert caught.value.reason is Reason.TRAINING_DIVERGED
    assert caught.value.metadata == {"step": "2"}


def test_a_result_that_is_not_finite_is_named() -> None:
    check_finite(torch.ones(3), 6, "learned sigma")
    with pytest.raises(HueshiftError, match="learned sigma was not finite at step 6") as caught:
        check_finite(torch.tensor([1.0, float("nan")]), 6, "learned sigma")
    assert caught.value.reason is Reason.TRAINING_DIVERGED


def test_prior_pictures_are_made_once_and_survive_a_stop(tiny: Tiny, tmp_path: Path) -> None:
    spec = make_spec(prior_weight=1.0, prior_images=6)
    # Asked once before every sampling step: stopping at the 20th question falls into the second group of pictures.
    with pytest.raises(Cancelled):
        run(tiny, spec, tmp_path / "a", Recorder(stop_when_asked=20))
    kept = {file.name: file.read_bytes() for file in (tmp_path / "a" / CLASS_FOLDER).glob("*/*.safetensors")}
    assert len(kept) == 1
    result = run(tiny, spec, tmp_path / "a")
    files = {file.name: file.read_bytes() for file in (tmp_path / "a" / CLASS_FOLDER).glob("*/*.safetensors")}
    assert len(files) == 2
    assert files.items() >= kept.items()
    assert_same(result, run(tiny, spec, tmp_path / "b"))
    assert result.losses != run(tiny, make_spec(prior_images=6), tmp_path / "c").losses


def test_a_moving_average_is_what_is_published(tiny: Tiny, tmp_path: Path) -> None:
    plain = run(tiny, make_spec(ema_decay=0.0), tmp_path / "plain")
    averaged = run(tiny, make_spec(ema_decay=0.9), tmp_path / "averaged")
    assert averaged.losses == plain.losses
    left, right = tensors_of(plain.adapter), tensors_of(averaged.adapter)
    assert any(not torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_nothing_learned_for_the_word_keeps_it_out_of_the_adapter(tiny: Tiny, tmp_path: Path) -> None:
    spec = replace(make_spec(), learn_identifier=False)
    assert run(tiny, spec, tmp_path).adapter.tokens == {}


def test_pictures_and_captions_must_pair_up(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="2 given for 3 captions"):
        run_training(
            make_spec(),
            make_pictures(2),
            base=tiny[0],
            factors=tiny[1],
            clip=None,
            workdir=tmp_path,
            hooks=Recorder(),
        )
    assert not (tmp_path / CHECKPOINT_FILE).exists()
