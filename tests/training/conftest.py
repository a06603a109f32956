"""The tiny base model of the training tests."""

import pytest
from tiny_training import make_tiny_base

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors


@pytest.fixture(scope="session")
def tiny(base_model: BaseModel) -> tuple[BaseModel, SpectralFactors]:
    """A base model with a tiny random UNet, and its decomposition. Nobody may change it."""
    return make_tiny_base(base_model)
