"""Class pictures: what the base model itself makes of a class noun, kept so that training does not forget it.

They stay latents: decoding and encoding them again would only add the autoencoder's error (Ruiz et al. 2023, section
3.2, train on pictures of the frozen model; so does this). They depend on no job, so jobs share them: files lie under a
key of all that decides them.
"""

import hashlib
import json
import shutil
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hueshift.engines.cache_files import write_atomically
from hueshift.training.methods.learnable import Rows
from hueshift.training.samples import Sampler

_log = structlog.get_logger()
# Saved together, so that a stopped job loses at most this many pictures. Fixed, because rounding depends on it.
_SAVE_BATCH = 4
# Keeps class pictures away from the seeds that people type, which sample pictures use.
_SEED_STEP = 0x9E3779B97F4A7C15
# A class of 200 pictures of SD1.5 has 13 MB.
MAX_CACHE_BYTES = 2**30


def class_prompt(class_noun: str) -> str:
    """Prompt of the class pictures."""
    return f"a {class_noun}"


def class_key(sampler: Sampler, prompt: str, seed: int) -> str:
    """Name of the folder of a prompt's class pictures: a hash of base, plan, prompt, seed and sampler.

    Their number is not in it: a job that wants more draws only those that are missing.
    """
    decides = {
        "base": sampler.base.base_hash,
        "plan": sampler.unet.plan.value,
        "prompt": prompt,
        "seed": seed,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "batch": _SAVE_BATCH,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def class_latents(
    folder: Path, sampler: Sampler, prompt: str, context: Tensor, rows: Rows, *, count: int, seed: int
) -> Tensor:
    """Return latents [count, 4, h, w] of class pictures: read from below `folder`, or drawn and kept there.

    `context` [tokens, width] is the prompt's; `rows` are the base's.
    """
    place = folder / class_key(sampler, prompt, seed)
    parts: list[Tensor] = []
    for begin in range(0, count, _SAVE_BATCH):
        size = min(_SAVE_BATCH, count - begin)
        file = place / f"{begin:04d}-{size}.safetensors"
        stored = _read(file, size)
        if stored is None:
            seeds = [(seed + _SEED_STEP * (begin + i + 1)) % 2**63 for i in range(size)]
            drawn = sampler.latents(context.expand(size, -1, -1), seeds, rows).cpu().contiguous()
            _write(file, drawn)
            stored = drawn
        parts.append(stored)
    if place.is_dir():
        place.touch()
    return torch.cat(parts)


def prune_cache(folder: Path, max_bytes: int = MAX_CACHE_BYTES) -> int:
    """Remove the classes that were not used for longest until the rest fits. Returns how many went."""
    classes = sorted((path for path in folder.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in classes]
    removed = 0
    while classes[removed:] and sum(sizes[removed:]) > max_bytes:
        shutil.rmtree(classes[removed], ignore_errors=True)
        removed += 1
    return removed


def _write(file: Path, latents: Tensor) -> None:
    write_atomically(file, lambda path: save_file({"latents": latents}, path))


def _read(file: Path, size: int) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        latents = load_file(file)["latents"]
    except (OSError, SafetensorError, KeyError) as error:
        _log.warning("training.class_pictures_unreadable", file=file.name, error=str(error))
        return None
    return latents if latents.shape[0] == size else None
