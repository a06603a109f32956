"""What the UNet reads of a prompt and a picture in training, as one tensor [n, tokens, width].

Stable Diffusion reads a context alone. SDXL also reads pooled text and six sizes of the picture (Podell et al. 2023,
sections 2.1 and 2.2). Here these lie behind the tokens, in rows of the same width filled up with zeros. Whatever
stacks, splits, gathers or captures contexts then carries them along, each sample with its own, and their gradients come
back by the same way; only `TrainingUNet` takes them apart again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.added_embedding import make_time_ids
from hueshift.engines.base_model import BaseModel
from hueshift.engines.encoder_weights import TowerWeights
from hueshift.engines.text import TextStage, TokenizedPrompt, Vectors
from hueshift.engines.transfer import to_device
from hueshift.training.spec import TrainingSpec

SIZES = 6
"""Numbers that SDXL is told of a picture: original height and width, top and left of the crop, height and width."""


def check_base(spec: TrainingSpec, base: BaseModel) -> None:
    """Raise InvalidArgument naming the setting if a job asks for what its base cannot be taught."""
    if base.xl is not None and spec.per_layer:
        raise InvalidArgument.for_field(
            "settings.per_layer",
            f"true given, but {base.name} is an SDXL model, whose pooled text belongs to no layer; leave it out: the "
            "word is then the same for all layers",
        )


def native_sizes(base: BaseModel) -> Tensor | None:
    """Sizes [1, 6] fp32 of a picture that is the base's own, as serving tells them; None for models that read none."""
    if base.xl is None:
        return None
    return torch.tensor([make_time_ids(base.pixels, base.pixels)], dtype=torch.float32)


def encode_packed(
    text: TextStage, rows: Sequence[TokenizedPrompt], learned: Sequence[Vectors], weights: TowerWeights = ()
) -> Tensor:
    """Encode prompts as `TextStage.encode_rows` does; SDXL's pooled text lies behind the tokens. Keeps gradients."""
    context, pooled = text.encode_pooled(rows, learned, weights)
    return context if pooled is None else torch.cat([context, _as_rows(pooled, context.shape[-1])], 1)


def add_sizes(packed: Tensor, sizes: Tensor) -> Tensor:
    """Put sizes [n, 6], from wherever they lie, behind what `encode_packed` made [n, rows, width]."""
    return torch.cat([packed, _as_rows(to_device(sizes, packed.device), packed.shape[-1])], 1)


class AddedReader:
    """Takes packed conditions apart, for a UNet of diffusers that reads pooled text and sizes."""

    def __init__(self, unet: Any, width: int) -> None:
        """`width` is that of tokens."""
        self._sinusoids: Any = unet.add_time_proj
        embedded = SIZES * int(unet.config.addition_time_embed_dim)
        self._pooled = int(unet.config.projection_class_embeddings_input_dim) - embedded
        self._behind = [_count(self._pooled, width), _count(SIZES, width)]

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context [n, tokens, width] and what `add_embedding` reads [n, features].

        That is pooled text and sinusoids of the sizes, as engines.added_embedding.AddedStage.features makes it.
        """
        tokens = packed.shape[1] - sum(self._behind)
        context, pooled, sizes = torch.split(packed, [tokens, *self._behind], 1)
        numbers = sizes.detach().flatten(1)[:, :SIZES]
        sinusoids: Tensor = self._sinusoids(numbers.flatten()).view(len(packed), -1)
        return context, torch.cat([pooled.flatten(1)[:, : self._pooled], sinusoids], -1)


def make_reader(unet: Any, width: int) -> AddedReader | None:
    """The reader of a UNet; None if it reads a context alone."""
    return AddedReader(unet, width) if unet.config.addition_embed_type == "text_time" else None


def _count(size: int, width: int) -> int:
    """Rows of `width` that hold `size` numbers."""
    return -(-size // width)


def _as_rows(flat: Tensor, width: int) -> Tensor:
    """Numbers [n, size] as rows [n, count, width], zeros behind them."""
    count = _count(flat.shape[1], width)
    return functional.pad(flat, (0, count * width - flat.shape[1])).view(len(flat), count, width)
