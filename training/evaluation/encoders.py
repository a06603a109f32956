"""What turns pictures into vectors to be compared: CLIP (training/scores.py) and DINO."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.training.pictures import picture_tensor


class PictureEncoder(Protocol):
    """Embeds pictures."""

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [n, width] of pictures."""
        ...


class DinoEncoder:
    """A self-supervised ViT (Caron et al. 2021). DreamBooth's metric takes ViT-S/16 and its class token.

    Any folder that transformers loads as a ViT whose first output token is the class token will do: DINO's
    `dino-vits16` or DINOv2. Its weights must be safetensors; they are not part of this project.
    """

    def __init__(self, path: Path) -> None:
        """Load the folder at `path` in fp32. Raises InvalidArgument (MODEL_FILE_INVALID) if it cannot be read."""
        try:
            self._model: Any = AutoModel.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            config = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
            self._mean, self._std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
            size = config.get("crop_size") or config["size"]
            self._size = int(size if isinstance(size, int) else size["height"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InvalidArgument(
                Reason.MODEL_FILE_INVALID,
                f"{path}: DINO cannot be read: {error}; give a folder of a ViT with model.safetensors and "
                "preprocessor_config.json",
            ) from error
        self._model.eval().requires_grad_(False)

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [n, width] of pictures: the class token of the last layer."""
        pixels = torch.stack([picture_tensor(picture, self._size) for picture in pictures])
        hidden = self._model(pixel_values=(pixels.add(1).div(2) - self._mean) / self._std).last_hidden_state
        return functional.normalize(hidden[:, 0], dim=-1)


def load_dino(path: Path | None) -> tuple[DinoEncoder | None, str]:
    """Load DINO, or return None and the words that say why there is none, for reports: it is never left out silently.

    Raises InvalidArgument if a path is given and cannot be read.
    """
    if path is None:
        return None, "DINO was not measured: no folder of its weights was given"
    return DinoEncoder(path), ""
