"""Masks, class pictures, offset noise: each against numbers worked out by hand; and nothing drawn that is not asked."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_training import make_pair_spec, make_spec, make_task

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.loop import batch_loss, draw_batch
from hueshift.training.objectives.denoising import denoising_loss
from hueshift.training.objectives.masks import SubjectMasks
from hueshift.training.objectives.objective import Batch, Draws, Halves
from hueshift.training.objectives.offset_noise import OffsetNoise
from hueshift.training.objectives.prior import ClassPictures, PriorPreservation

Tiny = tuple[BaseModel, SpectralFactors]


def make_batch(rows: int = 2) -> Batch:
    return Batch(
        torch.zeros(rows, 4, 2, 2),
        torch.zeros(0),
        torch.zeros(rows, dtype=torch.int64),
        torch.full((rows,), 1 / rows),
        ("a",) * rows,
        torch.arange(rows),
    )


def test_masked_loss_is_the_weighted_mean_of_each_row() -> None:
    # One channel; errors 1, 2 / 3, 4 squared to 1, 4 / 9, 16.
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.5, 0.0]]).view(1, 1, 2, 2)
    loss = denoising_loss(target, torch.ones(1), torch.zeros(1, 1, 2, 2), mask)
    assert loss.item() == pytest.approx((1 * 1 + 0.5 * 9) / 1.5)
    full = denoising_loss(target, torch.ones(1), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert full.item() == pytest.approx(denoising_loss(target, torch.ones(1), torch.zeros(1, 1, 2, 2)).item())


def test_each_row_gets_the_mask_of_what_it_shows() -> None:
    masks = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])[:, None]
    half_masks = torch.tensor([[[0.0], [1.0]], [[1.0], [0.0]]])[:, None]
    batch = make_batch(3)
    pictures = torch.tensor([1, -1, -1])
    cut = Batch(
        batch.clean,
        batch.noise,
        batch.timesteps,
        batch.weights,
        batch.captions,
        pictures,
        None,
        {2: Halves(0, 1, (0, 1))},
    )
    weights = SubjectMasks(masks, half_masks, 0.25).rows(cut, Draws(torch.Generator())).pixel_weights
    assert weights is not None
    assert weights[0, 0].tolist() == [[1.0, 1.0], [0.25, 0.25]]
    assert weights[1, 0].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert weights[2, 0].tolist() == [[0.25, 1.0], [1.0, 0.25]]


def test_class_pictures_follow_with_lambda_shared_among_them() -> None:
    classes = [
        ClassPictures(torch.full((2, 4, 2, 2), value), f"a {noun}", noun)
        for value, noun in ((1.0, "cat"), (2.0, "dog"))
    ]
    draws = Draws(torch.Generator().manual_seed(0))
    prior = PriorPreservation(classes, 0.5, 1000, 0)
    first, second = (prior.rows(make_batch(2), draws) for _ in range(2))
    assert first.weights.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert first.pictures.tolist() == [0, 1, -1, -1]
    for batch in (first, second):
        told = {1.0: "a cat", 2.0: "a dog"}
        assert [told[float(latents.mean())] for latents in batch.clean[2:]] == list(batch.captions[2:])
    # Each class picture comes once before any comes again.
    assert sorted(first.captions[2:] + second.captions[2:]) == ["a cat", "a cat", "a dog", "a dog"]


def test_offset_noise_moves_each_channel_as_a_whole() -> None:
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = Batch(noise, noise, torch.zeros(2), torch.ones(2))
    moved = OffsetNoise(0.1).noised(batch, Draws(torch.Generator().manual_seed(5))).noise - noise
    expected = 0.1 * torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(moved, expected.expand_as(moved), atol=1e-6)


def test_masks_decide_what_a_real_step_learns_from(tiny: Tiny) -> None:
    half = Image.new("L", (40, 32), 0)
    half.paste(255, (0, 0, 20, 32))
    spec = make_pair_spec(cut_mix_probability=0.0, background_weight=0.0, anchor_below=0)
    task, state = make_task(*tiny, replace(spec, masked_pictures=(0, 2)), {0: half, 2: half})
    masks = task.pictures.masks
    assert masks is not None
    assert masks[0, 0, :, :4].eq(1).all()
    assert masks[0, 0, :, 4:].eq(0).all()
    assert masks[1].eq(1).all()
    batch = draw_batch(task, state)
    assert batch.pixel_weights is not None
    for row, picture in enumerate(batch.pictures.tolist()):
        assert torch.equal(batch.pixel_weights[row], masks[picture])
    assert batch_loss(task, state.values, batch).isfinite()


def test_masks_that_do_not_fit_are_named(tiny: Tiny) -> None:
    spec = replace(make_spec(), masked_pictures=(1,))
    with pytest.raises(InvalidArgument, match="same wanted") as caught:
        make_task(*tiny, spec, {1: Image.new("L", (41, 32), 255)})
    assert caught.value.violations[0].field == "pictures[1].mask"
    with pytest.raises(InvalidArgument, match="black all over"):
        make_task(*tiny, spec, {1: Image.new("L", (40, 32), 0)})


def test_objectives_that_are_off_draw_nothing(tiny: Tiny) -> None:
    plain, plain_state = make_task(*tiny, make_spec())
    weighted, weighted_state = make_task(*tiny, make_spec(min_snr_gamma=1e-3))
    a, b = draw_batch(plain, plain_state), draw_batch(weighted, weighted_state)
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.timesteps, b.timesteps)
    assert not torch.equal(a.weights, b.weights)
    assert torch.equal(plain_state.draws.generator.get_state(), weighted_state.draws.generator.get_state())
