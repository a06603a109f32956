"""On the embedded base model itself: a few steps make the pictures more likely, on noise that is always the same."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import Recorder

from hueshift.adapters.adapter import Adapter
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors, load_factors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.defaults import complete_spec
from hueshift.training.latents import make_picture_set
from hueshift.training.objectives.denoising import denoising_loss
from hueshift.training.run import run_training
from hueshift.training.spec import Method, SubjectKind, TrainingSpec

FOX = Path(__file__).resolve().parents[2] / "examples" / "pictures" / "fox"


def read_fox() -> tuple[list[Image.Image], list[str]]:
    entries = [e for e in json.loads((FOX / "captions.json").read_text()) if e["file"].startswith("train/")]
    return [Image.open(FOX / entry["file"]) for entry in entries], [entry["caption"] for entry in entries]


@torch.no_grad()
def fixed_loss(base: BaseModel, factors: SpectralFactors, spec: TrainingSpec, adapter: Adapter | None) -> float:
    """Loss of the four pictures at 100, 300, 500 and 800, each with the same noise, in fp32 as it is served."""
    pictures, captions = read_fox()
    generator = torch.Generator().manual_seed(11)
    clean = make_picture_set(VaeStage(base), spec, pictures, {}, base.pixels).latents.mean
    timesteps = torch.tensor([100, 300, 500, 800])
    noise = torch.randn(clean.shape, generator=generator)
    rows = RowLayout(base.layout, ("proj_out",), 16)
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    row = rows.compose([(adapter, 1.0)] if adapter else [], factors, norms)
    unet = AdaptedUNet(base, factors, rows, Plan.FACTORED if row.needs_factored else Plan.DENSE)
    context = TextStage(base).encode(captions, adapter.tokens if adapter else {}).context
    noisy = base.schedule.add_noise(clean, noise, timesteps)
    spectral, lowrank = (None if part is None else part[None] for part in (row.spectral, row.lowrank))
    output = unet.forward_rows(noisy, timesteps, context, spectral, lowrank)
    return denoising_loss(noise, torch.full((4,), 0.25), output).item()


@pytest.mark.slow
@pytest.mark.parametrize("method", [Method.SVDIFF, Method.RESIDUALS])
def test_twelve_steps_lower_the_loss(base_model: BaseModel, cache_dir: Path, tmp_path: Path, method: Method) -> None:
    factors = load_factors(base_model, cache_dir)
    pictures, captions = read_fox()
    spec = complete_spec(
        method=method,
        subject_kind=SubjectKind.SUBJECT,
        captions=captions,
        identifier="sks",
        class_noun="animal",
        steps=12,
        # What training does, not its average: that of so few steps still remembers the untrained beginning. And with
        # the anchor up to 250: below the subject's default of 150, twelve steps lose at t = 300 what they gain above.
        ema_decay=0.0,
        identifier_learning_rate=1e-2,
        anchor_below=250,
    )
    result = run_training(
        spec, pictures, base=base_model, factors=factors, clip=None, workdir=tmp_path, hooks=Recorder()
    )
    before, after = (fixed_loss(base_model, factors, spec, adapter) for adapter in (None, result.adapter))
    assert after < 0.9 * before
