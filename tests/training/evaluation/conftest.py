"""A painter and judges that cost little: the tiny base by the torch engine, and the embedded CLIP."""

import pytest
import torch

from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.torch_engine import TorchEngine
from hueshift.models.embedded import EMBEDDED_CLIP
from hueshift.training.evaluation.drawing import BRANCHES, Painter
from hueshift.training.evaluation.protocol import Judges
from hueshift.training.scores import ClipScorer


@pytest.fixture(scope="session")
def painter(tiny: tuple[BaseModel, SpectralFactors]) -> Painter:
    """Draws 32 pixel pictures of noise, in three steps."""
    base, factors = tiny
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    rows = RowLayout(base.layout, BRANCHES, 8, text_side=False)
    engine = TorchEngine(base, factors, rows, norms, slots=4, max_batch=8, device=torch.device("cpu"))
    return Painter(base, engine, steps=3)


@pytest.fixture(scope="session")
def judges() -> Judges:
    """The embedded CLIP, and itself in DINO's place."""
    clip = ClipScorer(EMBEDDED_CLIP)
    return Judges(clip, clip)
