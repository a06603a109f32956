"""What a stopped run needs to go on as if it had never stopped, in one file that is either whole or absent."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hueshift.engines.cache_files import write_atomically
from hueshift.training.spec import TrainingSpec

_FORMAT = "hueshift.checkpoint/2"
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The state of a run after `step` steps: all its tensors by name, and the loss of every step."""

    step: int
    tensors: dict[str, Tensor]
    losses: list[float]


def fingerprint_job(spec: TrainingSpec, pictures: Iterable[Image.Image], base_hash: str) -> str:
    """SHA-256 of all that decides a run, masks among the pictures: a checkpoint of anything else must not go on."""
    digest = hashlib.sha256(json.dumps(spec.to_json(), sort_keys=True).encode())
    digest.update(base_hash.encode())
    for picture in pictures:
        digest.update(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, checkpoint: Checkpoint, fingerprint: str, keep: int = 1) -> None:
    """Replace the file at `path`; a crash at any moment leaves the old or the new one.

    The last `keep` - 1 before it stay beside it under their steps, for a disk that loses the newest.
    """
    if keep > 1 and path.is_file():
        _set_aside(path, keep - 1)
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "step": str(checkpoint.step),
        # Hexadecimal floats come back bit for bit.
        "losses": json.dumps([loss.hex() for loss in checkpoint.losses]),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    write_atomically(path, lambda file: save_file(tensors, file, metadata))


def read_checkpoint(path: Path, fingerprint: str) -> Checkpoint | None:
    """Read the file at `path`, or the newest before it that can be read.

    None, with a log line where there was one, if a run must start from the beginning.
    """
    files = [path, *reversed(_older(path))]
    return next((found for file in files if (found := _read(file, fingerprint)) is not None), None)


def _older(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))


def _set_aside(path: Path, keep: int) -> None:
    try:
        with safe_open(path, framework="pt") as stored:
            step = int((stored.metadata() or {})["step"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        _log.warning("training.checkpoint_unreadable", file=path.name, error=str(error))
        return
    aside = path.with_name(f"{path.stem}-{step:06d}{path.suffix}")
    aside.unlink(missing_ok=True)
    # A second name for the same file: the new checkpoint takes the first one's place.
    aside.hardlink_to(path)
    for old in _older(path)[:-keep]:
        old.unlink(missing_ok=True)


def _read(path: Path, fingerprint: str) -> Checkpoint | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != fingerprint:
                _log.warning("training.checkpoint_refused", file=path.name, problem="it belongs to another job or base")
                return None
            # Cloned: the file is replaced while the run goes on.
            tensors = {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118 (not a dict)
        losses = [float.fromhex(loss) for loss in json.loads(metadata["losses"])]
        return Checkpoint(int(metadata["step"]), tensors, losses)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        _log.warning("training.checkpoint_unreadable", file=path.name, error=str(error))
        return None
