"""What jobs cost, learned from those that ran: seconds per step by base, method and size of a step."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from hueshift.engines.cache_files import exclusive, write_atomically
from hueshift.training.spec import Method, TrainingSpec

# Older steps fade, so that a new machine is believed after a few jobs.
_MAX_STEPS = 1000
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a job's steps take in seconds of the training device, from the mean of `measured_steps`."""

    seconds: float
    seconds_per_step: float
    measured_steps: int


class SpeedBook:
    """Measured speeds in one JSON file, shared by the processes that train and those that estimate."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def record(self, base_hash: str, spec: TrainingSpec, steps: int, seconds: float) -> None:
        """Remember that `steps` steps of such a job took `seconds`."""
        if steps == 0:
            return
        with exclusive(self._file):
            book = self._read()
            speeds = book.setdefault(_kind(base_hash, spec), {})
            known = speeds.get(str(_rows(spec)), {"steps": 0, "seconds": 0.0})
            kept = min(known["steps"], max(0, _MAX_STEPS - steps))
            before = known["seconds"] / known["steps"] * kept if known["steps"] else 0.0
            speeds[str(_rows(spec))] = {"steps": kept + steps, "seconds": before + seconds}
            write_atomically(self._file, lambda path: _write(path, book))

    def estimate(self, base_hash: str, spec: TrainingSpec) -> Cost | None:
        """Return what a job will cost, None if no job of its kind was measured.

        Steps of a size that was not measured are taken to cost as the nearest one does, by their rows.
        """
        speeds = self._read().get(_kind(base_hash, spec), {})
        if not speeds:
            return None
        rows = _rows(spec)
        nearest = min((int(size) for size in speeds), key=lambda size: (abs(size - rows), size))
        measured = speeds[str(nearest)]
        per_step = measured["seconds"] / measured["steps"] * rows / nearest
        return Cost(per_step * spec.steps, per_step, measured["steps"])

    def _read(self) -> dict[str, Any]:
        try:
            book = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.warning("training.speeds_unreadable", file=self._file.name, error=str(error))
            return {}
        return book if isinstance(book, dict) else {}


def _write(path: Path, book: dict[str, Any]) -> None:
    path.write_text(json.dumps(book, sort_keys=True), encoding="utf-8")


def open_speeds(cache: Path) -> SpeedBook:
    """Return the book of a cache folder."""
    return SpeedBook(cache.expanduser() / "training-speed.json")


def _kind(base_hash: str, spec: TrainingSpec) -> str:
    checkpointed = "/checkpointed" if spec.gradient_checkpointing else ""
    encoder = "/text-encoder" if spec.train_text_encoder else ""
    # Its optimiser moves all weights then, not the few that a low-rank change is served of.
    every = "/every-layer" if spec.method is Method.DREAMBOOTH and not spec.targets else ""
    return f"{base_hash[:16]}/{spec.method.value}/{spec.precision.value}{checkpointed}{encoder}{every}"


def _rows(spec: TrainingSpec) -> int:
    """Rows of the UNet in one step."""
    return spec.batch_size * spec.gradient_accumulation * (2 if spec.prior_weight > 0 else 1)
