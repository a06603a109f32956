"""The embedded CLIP knows pictures and prompts apart, and reads pixels as it was trained to."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.models.embedded import EMBEDDED_CLIP
from hueshift.training.methods.learnable import Rows
from hueshift.training.samples import Sampler
from hueshift.training.scores import ClipScorer
from hueshift.training.unet import TrainingUNet

PICTURES = Path(__file__).resolve().parents[2] / "examples" / "pictures"


@pytest.fixture(scope="module")
def clip() -> ClipScorer:
    return ClipScorer(EMBEDDED_CLIP)


def read(name: str) -> Image.Image:
    return Image.open(PICTURES / name).convert("RGB")


def test_a_picture_is_itself_and_more_like_its_kind_than_like_others(clip: ClipScorer) -> None:
    fox, other = read("fox/eval/fluent-3d.png"), read("fox/train/fluent-modern.png")
    lemon = read("openmoji/train/lemon.png")
    assert clip.clip_i([fox], [fox]) == pytest.approx(1, abs=1e-5)
    assert clip.clip_i([fox], [other]) > clip.clip_i([fox], [lemon]) + 0.3
    assert clip.clip_i_pairs([fox, fox], [fox, lemon]) == pytest.approx(
        [clip.clip_i([fox], [fox]), clip.clip_i([fox], [lemon])], abs=1e-5
    )


def test_clip_i_is_the_mean_over_all_pairs(clip: ClipScorer) -> None:
    a = [read("fox/train/noto.png"), read("openmoji/train/house.png")]
    b = [read("fox/train/twemoji.png"), read("openmoji/train/pencil.png"), read("openmoji/eval/pear.png")]
    single = [clip.clip_i([x], [y]) for x in a for y in b]
    assert clip.clip_i(a, b) == pytest.approx(math.fsum(single) / 6, abs=1e-5)


def test_prompts_are_scored_in_order(clip: ClipScorer, base_model: BaseModel) -> None:
    """Also a test of the sampler: CLIP knows only things that the base can draw."""
    text = TextStage(base_model)
    layout = RowLayout(base_model.layout, (), 1)
    unet = AdaptedUNet(base_model, SpectralFactors({}, {}, {}), layout, Plan.DENSE)
    asked = []
    layers = base_model.layout.cross_attentions
    trained = TrainingUNet(unet, layers, base_model.layout.token_width)
    sampler = Sampler(base_model, trained, VaeStage(base_model), text.empty, lambda: asked.append(1), steps=8)
    prompts = ["a fluent 3d emoji of a dog face", "a noto emoji of a lemon"]
    pictures = sampler.pictures(text.encode(prompts, {}).context, [0, 1], Rows())
    assert len(asked) == 8
    assert clip.clip_t(pictures, prompts) > clip.clip_t(pictures, prompts[::-1]) + 0.2


def test_pixels_are_normalised_as_transformers_does(clip: ClipScorer) -> None:
    picture = read("fox/train/twemoji.png")
    pixels = CLIPImageProcessor.from_pretrained(EMBEDDED_CLIP)(picture, return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(EMBEDDED_CLIP, dtype=torch.float32)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    assert torch.allclose(clip.embed_pictures([picture]), expected, atol=1e-4)


def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED_CLIP / "config.json", tmp_path)
    with pytest.raises(InvalidArgument, match=tmp_path.name) as caught:
        ClipScorer(tmp_path)
    assert caught.value.reason is Reason.MODEL_FILE_INVALID
