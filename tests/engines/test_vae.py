"""Latents to pixels and back."""

import numpy as np
import pytest
import torch

from hueshift.engines.base_model import BaseModel
from hueshift.engines.vae import VaeStage


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
