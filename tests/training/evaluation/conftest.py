"""A painter and judges that cost little: the tiny base by the torch engine, and the embedded CLIP."""

import pytest
from tiny_painter import make_tiny_painter

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.models.embedded import EMBEDDED_CLIP
from hueshift.training.evaluation.drawing import Painter
from hueshift.training.evaluation.protocol import Judges
from hueshift.training.scores import ClipScorer


@pytest.fixture(scope="session")
def painter(tiny: tuple[BaseModel, SpectralFactors]) -> Painter:
    """Draws pictures of noise."""
    return make_tiny_painter(*tiny)


@pytest.fixture(scope="session")
def judges() -> Judges:
    """The embedded CLIP, and itself in DINO's place."""
    clip = ClipScorer(EMBEDDED_CLIP)
    return Judges(clip, clip)
