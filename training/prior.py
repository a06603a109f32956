"""Class pictures: what the base model itself makes of the class noun, kept so that training does not forget it.

They stay latents: decoding and encoding them again would only add the autoencoder's error (Ruiz et al. 2023, section
3.2, train on pictures of the frozen model; so does this).
"""

from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hueshift.engines.cache_files import write_atomically
from hueshift.training.parameters import Rows
from hueshift.training.samples import Sampler

_log = structlog.get_logger()
# Saved together, so that a stopped job loses at most this many pictures. Fixed, because rounding depends on it.
_SAVE_BATCH = 4
# Keeps class pictures away from the seeds that people type, which sample pictures use.
_SEED_STEP = 0x9E3779B97F4A7C15


def class_prompt(class_noun: str) -> str:
    """Prompt of the class pictures."""
    return f"a {class_noun}"


def class_latents(
    folder: Path, fingerprint: str, sampler: Sampler, context: Tensor, rows: Rows, *, count: int, seed: int
) -> Tensor:
    """Return latents [count, 4, h, w] of class pictures: read from `folder`, or drawn and kept there.

    `context` [tokens, width] is the class prompt's; `rows` are the base's. `fingerprint` names the job, and files of
    another job are drawn anew.
    """
    parts: list[Tensor] = []
    for begin in range(0, count, _SAVE_BATCH):
        size = min(_SAVE_BATCH, count - begin)
        file = folder / f"{begin:04d}-{fingerprint[:16]}.safetensors"
        stored = _read(file, size)
        if stored is None:
            seeds = [(seed + _SEED_STEP * (begin + i + 1)) % 2**63 for i in range(size)]
            _write(file, sampler.latents(context.expand(size, -1, -1), seeds, rows))
            stored = load_file(file)["latents"]
        parts.append(stored)
    return torch.cat(parts)


def _write(file: Path, latents: Tensor) -> None:
    write_atomically(file, lambda path: save_file({"latents": latents.cpu().contiguous()}, path))


def _read(file: Path, size: int) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        latents = load_file(file)["latents"]
    except (OSError, SafetensorError, KeyError) as error:
        _log.warning("training.class_pictures_unreadable", file=file.name, error=str(error))
        return None
    return latents if latents.shape[0] == size else None
