"""One step: what the rows of a batch aim at, and how pictures are taken."""

from dataclasses import replace

import pytest
import torch
from tiny_training import make_spec, make_task

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.loop import batch_loss, draw_batch
from hueshift.training.objectives.prior import ClassPictures, PriorPreservation
from hueshift.training.spec import Method
from hueshift.training.state import rate_scale

Tiny = tuple[BaseModel, SpectralFactors]


# Textual inversion changes the words alone, which the base reads too.
@pytest.mark.parametrize("method", [method for method in Method if method is not Method.TEXTUAL_INVERSION])
def test_below_the_anchor_the_base_is_the_target(tiny: Tiny, method: Method) -> None:
    task, state = make_task(*tiny, make_spec(method, anchor_below=1000))
    batch = draw_batch(task, state)
    assert batch_loss(task, state.values, batch).item() == pytest.approx(0, abs=1e-8)
    generator = torch.Generator().manual_seed(1)
    moved = {name: value + torch.randn(value.shape, generator=generator) for name, value in state.values.items()}
    assert batch_loss(task, moved, batch).item() > 1e-4


def test_above_the_anchor_the_noise_is_the_target(tiny: Tiny) -> None:
    task, state = make_task(*tiny, make_spec(anchor_below=0))
    batch = draw_batch(task, state)
    context = task.captions.contexts(batch.captions, None)
    noisy = task.schedule.add_noise(batch.clean, batch.noise, batch.timesteps)
    output = tiny[0].unet(noisy, batch.timesteps, encoder_hidden_states=context).sample
    expected = (output - batch.noise).square().mean().item()
    # Products may run in bfloat16, with 8 bits.
    assert batch_loss(task, state.values, batch).item() == pytest.approx(expected, rel=2e-2)


def test_class_pictures_follow_the_pictures_with_their_own_weight(tiny: Tiny) -> None:
    task, state = make_task(*tiny, make_spec(prior_weight=0.25))
    latents = torch.full((5, 4, 8, 8), 7.0)
    prior = PriorPreservation([ClassPictures(latents, "a animal", "animal")], 0.25, 1000, 0)
    task = replace(task, objectives=(prior,))
    batch = draw_batch(task, state)
    assert batch.captions[2:] == ("a animal",) * 2
    assert (batch.clean[2:] == 7).all()
    assert (batch.clean[:2] != 7).any()
    assert batch.weights.tolist() == [0.5, 0.5, 0.125, 0.125]


def test_dropped_captions_are_empty(tiny: Tiny) -> None:
    task, state = make_task(*tiny, make_spec(caption_dropout=0.5))
    captions = [caption for _ in range(200) for caption in draw_batch(task, state).captions]
    assert captions.count("") / len(captions) == pytest.approx(0.5, abs=0.1)
    assert set(captions) == {"", *task.spec.captions}


def test_mirrored_pictures_double_the_set(tiny: Tiny) -> None:
    plain, _ = make_task(*tiny, make_spec())
    both, _ = make_task(*tiny, replace(make_spec(), mirror=True))
    assert (len(plain.pictures.turns), len(both.pictures.turns), len(both.pictures.captions)) == (3, 6, 6)
    assert torch.allclose(both.pictures.latents.mean[:3], plain.pictures.latents.mean, atol=1e-5)


def test_every_picture_is_taken_once_before_any_is_taken_again(tiny: Tiny) -> None:
    _, state = make_task(*tiny, make_spec())
    taken = torch.cat([state.draws.take("pictures", 2, 5) for _ in range(10)])
    for begin in range(0, 20, 5):
        assert sorted(taken[begin : begin + 5].tolist()) == [0, 1, 2, 3, 4]


def test_learning_rates_rise_and_fall() -> None:
    assert [rate_scale(step, 2, 4) for step in range(4)] == [0.5, 0.75, 0.5, 0.25]
    assert rate_scale(0, 0, 10) == 1
