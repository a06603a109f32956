"""Pictures become square tensors on white."""

import numpy as np
import torch
from PIL import Image

from hueshift.training.pictures import picture_tensor


def test_the_centre_square_is_kept() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = (255, 0, 128)
    tensor = picture_tensor(Image.fromarray(pixels, "RGB"), 8)
    assert tensor.shape == (3, 8, 8)
    expected = torch.tensor([1.0, -1.0, 128 / 127.5 - 1])
    assert torch.allclose(tensor, expected[:, None, None].expand(3, 8, 8), atol=1e-6)


def test_transparent_parts_are_white_whatever_lies_under_them() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (picture_tensor(clear, 4) == 1).all()
    palette = clear.convert("RGB").convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (picture_tensor(palette, 4) == 1).all()


def test_grey_pictures_are_read() -> None:
    tensor = picture_tensor(Image.new("L", (5, 7), 255), 6)
    assert tensor.shape == (3, 6, 6)
    assert (tensor == 1).all()
