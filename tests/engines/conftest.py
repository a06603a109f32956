"""Small base models that several engine tests share. Nobody may change them."""

import pytest
from tiny_unet import SD1_LIKE, SD2_LIKE, TinyParts, tiny_parts


@pytest.fixture(scope="session")
def tiny() -> TinyParts:
    """A base like Stable Diffusion 1.x."""
    return tiny_parts(SD1_LIKE)


@pytest.fixture(scope="session")
def tiny_sd2() -> TinyParts:
    """A base like Stable Diffusion 2.x: v prediction, linear projections, heads that differ by block."""
    return tiny_parts(SD2_LIKE)


@pytest.fixture(params=["tiny", "tiny_sd2"])
def any_tiny(request: pytest.FixtureRequest) -> TinyParts:
    """Each of them in turn."""
    parts: TinyParts = request.getfixturevalue(request.param)
    return parts
