"""How close pictures are to pictures and to prompts, by a CLIP model (Radford et al. 2021)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.training.pictures import picture_tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """How a job did: sample pictures against training pictures, against their prompts, and the base's own against both.

    All are mean cosines, -1 to 1. `clip_i_base` is `clip_i` of the base model's pictures of the same prompts and seeds.
    `prior_kept` compares pictures of the prompts without the learned words, with the adapter and without it, of the
    same seeds: 1 means that nothing else has changed. `diversity` is 1 minus the cosine of sample pictures of one
    prompt with each other; None where no prompt was drawn twice.
    """

    clip_i: float
    clip_t: float
    clip_i_base: float
    prior_kept: float | None = None
    diversity: float | None = None


class ClipScorer:
    """A CLIP whose pixels are normalised as its preprocessor_config.json says (emoji-clip: to -1..1)."""

    def __init__(self, path: Path) -> None:
        """Load the folder at `path` in fp32. Raises InvalidArgument (MODEL_FILE_INVALID) if it cannot be read."""
        try:
            self._model: Any = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(path)
            self._mean, self._std = _normalisation(path)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InvalidArgument(Reason.MODEL_FILE_INVALID, f"{path}: the CLIP cannot be read: {error}") from error
        self._model.eval().requires_grad_(False)
        self._size = int(self._model.config.vision_config.image_size)
        self._max_tokens = int(self._model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [n, width] of pictures."""
        pixels = torch.stack([picture_tensor(picture, self._size) for picture in pictures])
        pixels = (pixels.add(1).div(2) - self._mean) / self._std
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self._model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [n, width] of texts; what is over the model's length is cut off."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", max_length=self._max_tokens, truncation=True, return_tensors="pt"
        )
        pooled = self._model.text_model(input_ids=tokens.input_ids).pooler_output
        return functional.normalize(self._model.text_projection(pooled), dim=-1)

    def clip_i(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
        """Mean cosine of every picture of `a` with every picture of `b` (CLIP-I of Ruiz et al. 2023)."""
        return float((self.embed_pictures(a) @ self.embed_pictures(b).T).mean())

    def clip_i_pairs(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> list[float]:
        """Cosine of each picture of `a` with the one at the same place in `b`, which must be as long."""
        return [float(cosine) for cosine in (self.embed_pictures(a) * self.embed_pictures(b)).sum(-1)]

    def clip_t(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        """Mean cosine of each picture with the prompt at the same place in `prompts`, which must be as long."""
        return float((self.embed_pictures(pictures) * self.embed_texts(prompts)).sum(-1).mean())


def _normalisation(path: Path) -> tuple[Tensor, Tensor]:
    config = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    return mean, std
