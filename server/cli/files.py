"""Files that commands write."""

import os
import re
from pathlib import Path

_ENDINGS = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpg"}


def save(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all, with its folders, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays within one file system; the process id keeps two runs apart.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def picture_name(prompt: str, seed: int, media_type: str) -> str:
    """Return a file name that tells prompt and seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-")
    return f"{slug or 'picture'}-{seed}.{_ENDINGS.get(media_type, 'bin')}"


def free_path(path: Path) -> Path:
    """Return `path`, or the first of `name-2`, `name-3`, ... that does not exist, so that nothing is overwritten."""
    number, candidate = 2, path
    while candidate.exists():
        candidate = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return candidate
