"""Training pictures as latents: encoded once, drawn anew at every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.added_embedding import make_time_ids
from hueshift.engines.vae import VaeStage
from hueshift.training.pictures import Box, crop_boxes, mask_tensor, picture_sizes, picture_tensor
from hueshift.training.spec import TrainingSpec

# Encoding needs about 70 times the memory of the latents; a few pictures at once keep 512-pixel jobs under a gigabyte.
_ENCODE_BATCH = 4
# Keeps the crops away from what the job's generator draws.
_CROP_SEED = 0x5851F42D4C957F2D


@dataclass(frozen=True, slots=True, eq=False)
class PictureLatents:
    """Mean and standard deviation [n, 4, h, w] of the scaled latents of n pictures, fp32 on the CPU."""

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return self.mean.shape[0]

    def draw(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents [m, 4, h, w] of the pictures at `indices` [m] from the encoder's posterior."""
        mean = self.mean[indices]
        return mean + self.std[indices] * torch.randn(mean.shape, generator=generator)


@dataclass(frozen=True, slots=True, eq=False)
class PictureSet:
    """Every variant (crop, mirror image) of a job's pictures, with its caption and its subject.

    `turns` [m] int64 are the variants of one pass in which a picture comes as often as the job wants it. `halves` are
    latents [n, 4, h, w/2] of the middle halves, made for cut rows only. `masks` [n, 1, h, w] and `half_masks`
    [n, 1, h, w/2] are there if a picture has a mask. `sizes` [n + 1, 6] fp32 are what SDXL is told of each variant
    (training/pictures.py); the last row is that of pictures the base draws, so that index -1 finds it.
    """

    latents: PictureLatents
    captions: tuple[str, ...]
    subjects: tuple[int, ...]
    turns: Tensor
    halves: PictureLatents | None = None
    masks: Tensor | None = None
    half_masks: Tensor | None = None
    sizes: Tensor | None = None

    def sizes_of(self, variants: Tensor) -> Tensor | None:
        """Sizes [m, 6] of the variants [m] int64, -1 for rows that show none."""
        return None if self.sizes is None else self.sizes[variants]


def make_picture_set(
    vae: VaeStage, spec: TrainingSpec, pictures: Sequence[Image.Image], masks: Mapping[int, Image.Image], size: int
) -> PictureSet:
    """Encode a job's pictures at `size` x `size` pixels; mirror images follow the others, in the same order.

    Raises InvalidArgument if a mask has not the size of its picture or is empty in one of the crops, or if rows are to
    be cut but the base's latents cannot be halved.
    """
    shown = [(index, crop) for index, picture in enumerate(pictures) for crop in _crops(spec, index, picture)]
    pixels = torch.stack(
        [picture_tensor(pictures[index].crop(crop) if crop else pictures[index], size) for index, crop in shown]
    )
    sizes = [picture_sizes(pictures[index].size, crop, size) for index, crop in shown]
    if spec.mirror:
        pixels = torch.cat([pixels, pixels.flip(-1)])
        sizes += [picture_sizes(pictures[index].size, crop, size, mirrored=True) for index, crop in shown]
        shown = shown * 2
    latents = _encode(vae, pixels)
    halves = None
    if spec.cut_mix_probability > 0:
        if latents.mean.shape[-1] % 2 or size % 4:
            raise InvalidArgument.for_field(
                "settings.cut_mix_probability", f"the base's latents are {latents.mean.shape[-1]} wide: no half; give 0"
            )
        halves = _encode(vae, pixels[..., size // 4 : size // 4 + size // 2])
    whole = half = None
    if masks:
        whole = _masks(spec, pictures, masks, shown, latents.mean.shape[-1])
        width = whole.shape[-1]
        half = whole[..., width // 4 : width // 4 + width // 2] if halves is not None else None
    repeats = spec.picture_repeats or (1,) * len(pictures)
    return PictureSet(
        latents,
        tuple(spec.captions[index] for index, _ in shown),
        tuple(spec.subject_of(index) for index, _ in shown),
        torch.tensor([variant for variant, (index, _) in enumerate(shown) for _ in range(repeats[index])]),
        halves,
        whole,
        half,
        torch.tensor([*sizes, make_time_ids(size, size)], dtype=torch.float32),
    )


def _encode(vae: VaeStage, pixels: Tensor) -> PictureLatents:
    parts = [vae.moments(part) for part in torch.split(pixels, _ENCODE_BATCH)]
    mean, std = (torch.cat([part[i] for part in parts]).cpu() for i in (0, 1))
    return PictureLatents(mean, std)


def _crops(spec: TrainingSpec, index: int, picture: Image.Image) -> list[Box | None]:
    if not spec.random_crops:
        return [None]
    # A generator of its own for each picture, so that a resumed job finds its crops again.
    generator = torch.Generator().manual_seed((spec.seed + _CROP_SEED * (index + 1)) % 2**63)
    return [*crop_boxes(picture.size, spec.random_crops, generator)]


def _masks(
    spec: TrainingSpec,
    pictures: Sequence[Image.Image],
    masks: Mapping[int, Image.Image],
    shown: Sequence[tuple[int, Box | None]],
    side: int,
) -> Tensor:
    made: list[Tensor] = []
    for number, (index, crop) in enumerate(shown):
        mask = masks.get(index)
        if mask is None:
            made.append(torch.ones(1, side, side))
            continue
        if mask.size != pictures[index].size:
            raise InvalidArgument.for_field(
                f"pictures[{index}].mask",
                f"{mask.size} pixels, but its picture has {pictures[index].size}; same wanted",
            )
        tensor = mask_tensor(mask.crop(crop) if crop else mask, side)
        if not bool(tensor.any()) and spec.background_weight == 0:
            raise InvalidArgument.for_field(
                f"pictures[{index}].mask", "it is black all over what is trained on; paint the subject white"
            )
        made.append(tensor.flip(-1) if spec.mirror and number >= len(shown) // 2 else tensor)
    return torch.stack(made)
