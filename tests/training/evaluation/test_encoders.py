"""DINO is loaded from a folder of transformers, and never left out in silence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.training.evaluation.encoders import DinoEncoder, load_dino


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random ViT as DINO's folders are, but small."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        )
        ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406]).save_pretrained(tmp_path)
    return tmp_path


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")


def test_embeddings_are_the_class_tokens_of_transformers(folder: Path) -> None:
    pictures = [picture(0), picture(1)]
    rows = DinoEncoder(folder).embed_pictures(pictures)
    pixels = ViTImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    assert torch.allclose(rows, expected, atol=1e-4)
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32}}))
    with pytest.raises(InvalidArgument, match=r"preprocessor_config\.json") as caught:
        DinoEncoder(folder)
    assert caught.value.reason is Reason.MODEL_FILE_INVALID


def test_weights_that_are_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match="safetensors"):
        DinoEncoder(folder)


def test_no_folder_gives_words(folder: Path) -> None:
    encoder, words = load_dino(None)
    assert encoder is None
    assert "DINO was not measured" in words
    assert load_dino(folder)[1] == ""
