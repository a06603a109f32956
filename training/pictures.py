"""Pictures as the networks want them: square, on white, in -1 to 1."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels."""

# Smaller crops would cut the subject; what stands at the border is seldom it.
_LEAST_CROP = 0.8


def picture_tensor(picture: Image.Image, size: int) -> Tensor:
    """Crop the centre square of a picture, scale it to `size`, and return [3, size, size] fp32 in -1 to 1.

    Transparent parts become white, the ground that products and drawings are usually shown on; black would teach the
    model dark borders. Colours are read as they are stored; orientation tags must have been applied before.
    """
    fitted = ImageOps.fit(_on_white(picture), (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
    return pixels.permute(2, 0, 1).div_(127.5).sub_(1.0).contiguous()


def mask_tensor(mask: Image.Image, size: int) -> Tensor:
    """Fit a mask as `picture_tensor` does a picture; return [1, size, size] fp32: 1 where white, 0 where black."""
    fitted = ImageOps.fit(mask.convert("L"), (size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(fitted, dtype=np.float32)).div_(255.0)[None]


def crop_boxes(size: tuple[int, int], count: int, generator: torch.Generator) -> list[Box]:
    """Draw `count` squares inside of a picture of `size` (width, height), evenly in place and in size.

    Their sides are 80 to 100 % of the picture's shorter one.
    """
    boxes: list[Box] = []
    for scale, across, down in torch.rand(count, 3, generator=generator).tolist():
        side = round(min(size) * (_LEAST_CROP + (1 - _LEAST_CROP) * scale))
        left, upper = round((size[0] - side) * across), round((size[1] - side) * down)
        boxes.append((left, upper, left + side, upper + side))
    return boxes


def picture_sizes(size: tuple[int, int], crop: Box | None, target: int, *, mirrored: bool = False) -> tuple[int, ...]:
    """What SDXL is told of a square crop of a picture of `size` (width, height), scaled to `target` pixels a side.

    Six numbers in the order of engines.added_embedding.make_time_ids. The picture's size is its own, and the crop's
    corner is counted in pixels of the picture scaled as the crop is: in SDXL's own training pictures were scaled first
    and cropped then (Podell et al. 2023, section 2.2). `crop` None is the centre square; with `mirrored` the picture
    was mirrored before it was cropped.
    """
    width, height = size
    side = float(min(size))
    left, upper = (width - side) / 2, (height - side) / 2
    if crop is not None:
        left, upper, side = crop[0], crop[1], crop[2] - crop[0]
    if mirrored:
        left = width - left - side
    scale = target / side
    return (height, width, round(upper * scale), round(left * scale), target, target)


def _on_white(picture: Image.Image) -> Image.Image:
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layers = picture.convert("RGBA")
    ground = Image.new("RGBA", layers.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, layers).convert("RGB")
