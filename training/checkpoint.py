"""What a stopped run needs to go on as if it had never stopped, in one file that is either whole or absent."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hueshift.engines.cache_files import write_atomically
from hueshift.training.spec import TrainingSpec

_FORMAT = "hueshift.checkpoint/1"
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The state of a run after `step` steps: all its tensors by name, and the loss of every step."""

    step: int
    tensors: dict[str, Tensor]
    losses: list[float]


def fingerprint_job(spec: TrainingSpec, pictures: Sequence[Image.Image], base_hash: str) -> str:
    """SHA-256 of all that decides a run: a checkpoint of anything else must not be continued."""
    digest = hashlib.sha256(json.dumps(spec.to_json(), sort_keys=True).encode())
    digest.update(base_hash.encode())
    for picture in pictures:
        digest.update(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, checkpoint: Checkpoint, fingerprint: str) -> None:
    """Replace the file at `path`; a crash at any moment leaves the old or the new one."""
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
    """Read the file at `path`; None, with a log line where there was one, if a run must start from the beginning."""
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
