"""Small base models that several engine tests share. Nobody may change them."""

from collections.abc import Iterator

import pytest
import torch
from tiny_unet import SD1_LIKE, SD2_LIKE, SDXL_LIKE, TinyParts, tiny_parts


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread: matrices of sixteen rows gain nothing from two, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> TinyParts:
    """A base like Stable Diffusion 1.x."""
    return tiny_parts(SD1_LIKE)


@pytest.fixture(scope="session")
def tiny_sd2() -> TinyParts:
    """A base like Stable Diffusion 2.x: v prediction, linear projections, heads that differ by block."""
    return tiny_parts(SD2_LIKE)


@pytest.fixture(scope="session")
def tiny_xl() -> TinyParts:
    """A base like SDXL, whose UNet takes `added` too."""
    return tiny_parts(SDXL_LIKE)


@pytest.fixture(params=["tiny", "tiny_sd2", "tiny_xl"])
def any_architecture(request: pytest.FixtureRequest) -> TinyParts:
    """Each of the three in turn."""
    parts: TinyParts = request.getfixturevalue(request.param)
    return parts


@pytest.fixture(params=["tiny", "tiny_sd2"])
def any_tiny(request: pytest.FixtureRequest) -> TinyParts:
    """Each of them in turn."""
    parts: TinyParts = request.getfixturevalue(request.param)
    return parts
