"""Latents to pixels and back."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hueshift.engines.base_model import BaseModel
from hueshift.engines.vae import VaeStage, tile_starts


@pytest.fixture(scope="module")
def stage(base_model: BaseModel) -> VaeStage:
    """One stage."""
    return VaeStage(base_model)


def test_decodes_to_bytes(base_model: BaseModel, stage: VaeStage) -> None:
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    pixels = stage.decode(latents)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 16 * base_model.latent_factor, 24 * base_model.latent_factor, 3)
    with torch.no_grad():
        raw = base_model.vae.decode(latents / base_model.vae.config.scaling_factor).sample
    expected = ((raw / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(float) - expected).max() <= 1


def test_decoding_alone_or_together_is_the_same(stage: VaeStage) -> None:
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    together = stage.decode(latents).astype(int)
    for i in range(3):
        assert np.abs(stage.decode(latents[i : i + 1])[0].astype(int) - together[i]).max() <= 1


def test_encoding_is_drawn_from_the_moments(stage: VaeStage) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, deviation = stage.moments(pixels)
    drawn = stage.encode(pixels, torch.Generator().manual_seed(3))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, mean + deviation * noise)
    assert not drawn.requires_grad


def test_a_plain_picture_survives_the_round_trip(stage: VaeStage) -> None:
    # The embedded model knows drawings on white.
    picture = torch.ones(1, 3, 128, 128)
    picture[:, :, 32:96, 32:96] = torch.tensor([1.0, 0.6, -0.6]).view(1, 3, 1, 1)
    back = torch.from_numpy(stage.decode(stage.moments(picture)[0])).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (back - picture).abs().mean() < 0.1


@pytest.mark.parametrize(("length", "side"), [(8, 8), (9, 8), (16, 8), (31, 8), (128, 32), (5, 2)])
def test_tiles_cover_all_and_overlap(length: int, side: int) -> None:
    starts = tile_starts(length, side)
    assert starts[0] == 0
    assert starts[-1] + side >= length
    assert all(other - one <= side - side // 4 for one, other in pairwise(starts))
    assert starts == sorted(set(starts))


def test_tiles_make_the_same_picture(base_model: BaseModel, stage: VaeStage) -> None:
    """No seams: an error at a seam would be as large as the picture's contrast."""
    picture = torch.ones(1, 3, 192, 256)
    picture[:, :, 40:150, 50:200] = torch.tensor([1.0, 0.6, -0.6]).view(1, 3, 1, 1)
    latents = stage.moments(picture)[0]
    whole = stage.decode(latents).astype(int)
    tiled = VaeStage(base_model, tile_above=192).decode(latents.repeat(2, 1, 1, 1)).astype(int)
    assert tiled.shape == (2, 192, 256, 3)
    assert np.array_equal(tiled[0], tiled[1])
    difference = np.abs(tiled[0] - whole[0])
    assert difference.mean() < 3
    # Where tiles meet the pixels change no more than elsewhere.
    assert np.percentile(difference, 99) < 40


def test_only_larger_pictures_are_tiled(base_model: BaseModel, stage: VaeStage) -> None:
    latents = torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(4))
    for above in (0, 128, 1024):
        assert np.array_equal(VaeStage(base_model, tile_above=above).decode(latents), stage.decode(latents))
    assert not np.array_equal(VaeStage(base_model, tile_above=127).decode(latents), stage.decode(latents))


def test_memory_of_a_tile_is_the_limit(base_model: BaseModel) -> None:
    seen: list[int] = []
    hook = base_model.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:].numel()))
    try:
        VaeStage(base_model, tile_above=64).decode(torch.zeros(2, 4, 32, 24))
    finally:
        hook.remove()
    assert len(seen) >= 2 * 20
    assert max(seen) == 8 * 8
