"""One step: what the rows of a batch aim at, and how pictures are taken."""

from dataclasses import replace

import pytest
import torch
from tiny_training import make_pictures, make_spec

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.identifier import Captions
from hueshift.training.latents import encode_pictures
from hueshift.training.loop import ClassPictures, TrainingTask, batch_loss, draw_batch
from hueshift.training.run import make_learnable
from hueshift.training.spec import Method, TrainingSpec
from hueshift.training.state import TrainingState, rate_scale

Tiny = tuple[BaseModel, SpectralFactors]


def make_task(tiny: Tiny, spec: TrainingSpec) -> tuple[TrainingTask, TrainingState]:
    base, factors = tiny
    learnable = make_learnable(spec, base, factors)
    text = TextStage(base)
    task = TrainingTask(
        spec=spec,
        schedule=base.schedule,
        unet=AdaptedUNet(base, factors, learnable.layout, learnable.plan),
        learnable=learnable,
        captions=Captions(base, text, spec),
        pictures=encode_pictures(VaeStage(base), make_pictures(), base.pixels, mirror=spec.mirror),
        subjects=spec.captions * (2 if spec.mirror else 1),
        class_pictures=None,
        device=text.empty.device,
    )
    values = learnable.initial(torch.Generator().manual_seed(0))
    state = TrainingState(values, dict.fromkeys(values, 0.01), torch.Generator().manual_seed(3), spec)
    return task, state


@pytest.mark.parametrize("method", Method)
def test_below_the_anchor_the_base_is_the_target(tiny: Tiny, method: Method) -> None:
    task, state = make_task(tiny, make_spec(method, anchor_below=1000))
    batch, captions = draw_batch(task, state)
    assert batch_loss(task, state.values, batch, captions).item() == pytest.approx(0, abs=1e-8)
    moved = {name: value + 0.5 for name, value in state.values.items()}
    assert batch_loss(task, moved, batch, captions).item() > 1e-4


def test_above_the_anchor_the_noise_is_the_target(tiny: Tiny) -> None:
    task, state = make_task(tiny, make_spec(anchor_below=0))
    batch, captions = draw_batch(task, state)
    context = task.captions.contexts(captions, None)
    noisy = task.schedule.add_noise(batch.clean, batch.noise, batch.timesteps)
    output = tiny[0].unet(noisy, batch.timesteps, encoder_hidden_states=context).sample
    expected = (output - batch.noise).square().mean().item()
    # Products may run in bfloat16, with 8 bits.
    assert batch_loss(task, state.values, batch, captions).item() == pytest.approx(expected, rel=2e-2)


def test_class_pictures_follow_the_pictures_with_their_own_weight(tiny: Tiny) -> None:
    task, state = make_task(tiny, make_spec(prior_weight=0.25))
    latents = torch.full((5, 4, 8, 8), 7.0)
    task = replace(task, class_pictures=ClassPictures(latents, "a animal"))
    batch, captions = draw_batch(task, state)
    assert captions[2:] == ["a animal"] * 2
    assert (batch.clean[2:] == 7).all()
    assert (batch.clean[:2] != 7).any()
    assert batch.weights.tolist() == [0.5, 0.5, 0.125, 0.125]


def test_dropped_captions_are_empty(tiny: Tiny) -> None:
    task, state = make_task(tiny, make_spec(caption_dropout=0.5))
    captions = [caption for _ in range(200) for caption in draw_batch(task, state)[1]]
    assert captions.count("") / len(captions) == pytest.approx(0.5, abs=0.1)
    assert set(captions) == {"", *task.spec.captions}


def test_mirrored_pictures_double_the_set(tiny: Tiny) -> None:
    plain, _ = make_task(tiny, make_spec())
    both, _ = make_task(tiny, replace(make_spec(), mirror=True))
    assert (len(plain.pictures), len(both.pictures), len(both.subjects)) == (3, 6, 6)
    assert torch.allclose(both.pictures.mean[:3], plain.pictures.mean, atol=1e-5)


def test_every_picture_is_taken_once_before_any_is_taken_again(tiny: Tiny) -> None:
    _, state = make_task(tiny, make_spec())
    taken = torch.cat([state.take(2, 5) for _ in range(10)])
    for begin in range(0, 20, 5):
        assert sorted(taken[begin : begin + 5].tolist()) == [0, 1, 2, 3, 4]


def test_learning_rates_rise_and_fall() -> None:
    assert [rate_scale(step, 2, 4) for step in range(4)] == [0.5, 0.75, 0.5, 0.25]
    assert rate_scale(0, 0, 10) == 1
