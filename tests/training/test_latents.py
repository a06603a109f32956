"""Pictures as variants: crops, mirror images, repeats, and the middle halves that cut rows are made of."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_training import make_pair_spec, make_pictures, make_spec

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.vae import VaeStage
from hueshift.training.latents import PictureSet, make_picture_set
from hueshift.training.pictures import crop_boxes, mask_tensor, picture_tensor
from hueshift.training.spec import TrainingSpec

Tiny = tuple[BaseModel, SpectralFactors]


def make(tiny: Tiny, spec: TrainingSpec, masks: dict[int, Image.Image] | None = None) -> PictureSet:
    return make_picture_set(VaeStage(tiny[0]), spec, make_pictures(len(spec.captions)), masks or {}, tiny[0].pixels)


def test_crops_are_squares_inside_of_the_picture_of_80_to_100_percent() -> None:
    boxes = crop_boxes((200, 100), 300, torch.Generator().manual_seed(0))
    sides = [right - left for left, _, right, _ in boxes]
    assert all(lower - upper == right - left for left, upper, right, lower in boxes)
    assert (min(sides), max(sides)) == (80, 100)
    assert min(box[0] for box in boxes) <= 2
    assert max(box[2] for box in boxes) >= 198
    assert all(upper >= 0 and lower <= 100 and right <= 200 for _, upper, right, lower in boxes)


def test_every_picture_has_as_many_random_crops_as_asked_and_always_the_same(tiny: Tiny) -> None:
    spec = make_spec(random_crops=3, mirror=True)
    pictures = make(tiny, spec)
    assert len(pictures.latents) == 3 * 3 * 2
    assert pictures.captions == tuple(caption for caption in spec.captions for _ in range(3)) * 2
    assert torch.equal(make(tiny, spec).latents.mean, pictures.latents.mean)
    assert not torch.equal(make(tiny, replace(spec, seed=8)).latents.mean, pictures.latents.mean)
    assert not torch.equal(pictures.latents.mean[0], pictures.latents.mean[1])


def test_repeats_say_how_often_a_picture_comes_in_a_pass(tiny: Tiny) -> None:
    pictures = make(tiny, replace(make_spec(mirror=True), picture_repeats=(1, 3, 2)))
    assert pictures.turns.tolist() == [0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 5, 5]


def test_halves_are_encoded_from_the_middle_columns(tiny: Tiny) -> None:
    base = tiny[0]
    pictures = make(tiny, make_pair_spec())
    assert pictures.halves is not None
    assert pictures.halves.mean.shape == (3, 4, base.sample_size, base.sample_size // 2)
    size = base.pixels
    pixels = picture_tensor(make_pictures()[1], size)[None, :, :, size // 4 : size // 4 + size // 2]
    assert torch.allclose(pictures.halves.mean[1], VaeStage(base).moments(pixels)[0][0], atol=1e-4)
    assert pictures.subjects == (0, 0, 1)
    assert make(tiny, make_spec()).halves is None


def test_masks_follow_crops_and_mirrors(tiny: Tiny) -> None:
    mask = Image.new("L", (40, 32), 0)
    mask.paste(255, (0, 0, 20, 32))
    spec = replace(make_spec(mirror=True), masked_pictures=(0,))
    masks = make(tiny, spec, {0: mask}).masks
    assert masks is not None
    assert masks.shape == (6, 1, 8, 8)
    assert torch.equal(masks[3], masks[0].flip(-1))
    assert masks[0, 0, 0].tolist() == pytest.approx([1, 1, 1, 1, 0, 0, 0, 0], abs=0.02)
    assert masks[1].eq(1).all()
    grey = mask_tensor(Image.new("L", (8, 8), 51), 4)
    assert grey.flatten().tolist() == pytest.approx([0.2] * 16)
