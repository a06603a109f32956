"""A painter that costs little: the tiny base by the torch engine, 32 pixel pictures of noise in three steps."""

import torch

from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.torch_engine import TorchEngine
from hueshift.training.evaluation.drawing import BRANCHES, Painter


def make_tiny_painter(base: BaseModel, factors: SpectralFactors) -> Painter:
    """Make it of what tiny_training.make_tiny_base gives."""
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    rows = RowLayout(base.layout, BRANCHES, 8, text_side=False)
    engine = TorchEngine(base, factors, rows, norms, slots=4, max_batch=8, device=torch.device("cpu"))
    return Painter(base, engine, steps=3)
