"""Pictures as the networks want them: square, on white, in -1 to 1."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def picture_tensor(picture: Image.Image, size: int) -> Tensor:
    """Crop the centre square of a picture, scale it to `size`, and return [3, size, size] fp32 in -1 to 1.

    Transparent parts become white, the ground that products and drawings are usually shown on; black would teach the
    model dark borders. Colours are read as they are stored; orientation tags must have been applied before.
    """
    fitted = ImageOps.fit(_on_white(picture), (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
    return pixels.permute(2, 0, 1).div_(127.5).sub_(1.0).contiguous()


def _on_white(picture: Image.Image) -> Image.Image:
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layers = picture.convert("RGBA")
    ground = Image.new("RGBA", layers.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, layers).convert("RGB")
