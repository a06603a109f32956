"""Masks of regions: boxes and pictures, edges, overlaps; and masks as files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hueshift.engines.pictures import encode_mask
from hueshift.engines.region_masks import Area, Box, make_masks


def grey(levels: list[list[int]]) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.array(levels, np.uint8), "L").save(target, "PNG")
    return target.getvalue()


def one(area: Area, feather: float = 0.0, width: int = 64, height: int = 32) -> Tensor:
    return make_masks([(area, feather)], width, height, 8)[0]


def test_a_box_is_one_inside_and_a_share_at_cut_positions() -> None:
    mask = one(Box(8, 0, 20, 16))
    assert mask.shape == (4, 8)
    wanted = torch.zeros(4, 8)
    wanted[:2, 1:3], wanted[:2, 3] = 1.0, 0.5
    assert torch.equal(mask, wanted)
    assert torch.equal(one(Box(0, 0, 64, 32)), torch.ones(4, 8))


def test_a_picture_is_stretched() -> None:
    assert torch.equal(one(grey([[255]])), torch.ones(4, 8))
    assert torch.equal(one(grey([[0]])), torch.zeros(4, 8))
    assert torch.allclose(one(grey([[51]])), torch.full((4, 8), 0.2))
    halves = one(grey([[255] * 32 + [0] * 32] * 32))
    assert torch.equal(halves, torch.tensor([1.0] * 4 + [0.0] * 4).expand(4, 8))


@pytest.mark.parametrize("feather", [2, 15, 30, 256])
def test_a_feather_is_a_straight_ramp_across_the_edge(feather: int) -> None:
    mask = make_masks([(Box(0, 0, 64, 8), feather)], 128, 8, 1)[0][0]
    middle = (float(mask[63]) + float(mask[64])) / 2
    assert middle == pytest.approx(0.5)
    side = 2 * round(feather / 2) + 1
    ramp = mask[max(0, 64 - side // 2) : 64 + side // 2]
    steps = ramp[:-1] - ramp[1:]
    assert torch.allclose(steps, torch.full_like(steps, 1 / side), atol=1e-6)
    # The picture's own border does not fade, unless the edge is too near for that.
    assert float(mask[0]) == pytest.approx(min(1.0, (64 + side // 2) / side) if side > 128 else 1.0)
    assert float(mask.max()) <= 1


def test_what_overlaps_shares_in_proportion() -> None:
    left, right, faint = make_masks(
        [(Box(0, 0, 48, 32), 0.0), (Box(32, 0, 32, 32), 0.0), (grey([[51]]), 0.0)], 64, 32, 8
    )
    total = left + right + faint
    assert float(total.max()) <= 1 + 1e-6
    assert torch.allclose(left[:, :4], torch.full((4, 4), 1 / 1.2))
    assert torch.allclose(left[:, 4:6], torch.full((4, 2), 1 / 2.2))
    assert torch.equal(left[:, 4:6], right[:, 4:6])
    assert torch.allclose(total, torch.ones(4, 8))
    # What does not pass 1 is left as it is.
    first, second = make_masks([(grey([[102]]), 0.0), (Box(0, 0, 8, 8), 0.0)], 64, 32, 8)
    assert torch.allclose(first[0, 1:], torch.full((7,), 0.4))
    assert float(second[0, 0]) == pytest.approx(1 / 1.4)


def test_no_areas_are_no_masks() -> None:
    assert make_masks([], 64, 32, 8) == []


def test_a_mask_file_shows_blocks() -> None:
    mask = np.array([[0, 0.5, 1], [1.5, -1, 0.25]], np.float32)
    picture = Image.open(io.BytesIO(encode_mask(mask, 4)))
    assert (picture.mode, picture.size, picture.format) == ("L", (12, 8), "PNG")
    levels = np.asarray(picture)
    assert levels[::4, ::4].tolist() == [[0, 128, 255], [255, 0, 64]]
    assert (levels.reshape(2, 4, 3, 4).std((1, 3)) == 0).all()
