"""Adapters that are trained once and kept, by all that decides them: a second look at a comparison trains nothing."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cache_files import write_atomically
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.checkpoint import fingerprint_job
from hueshift.training.run import TrainingResult, run_training
from hueshift.training.spec import TrainingSpec

# A whole UNet's worth of deltas: those of SDXL are 5.1 GB in fp16.
_LIMITS = FileLimits(max_bytes=2**33)
_NAME_LENGTH = 24

OnStep = Callable[[int, int], None]
"""on_step(step, steps)."""


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """An adapter and how it came about.

    `step_seconds` is the median of its steps in wall seconds, None if another process took them all; `loss` the mean
    of the last ones; `kept_energy` what is kept of what was learned, None where nothing was compressed.
    """

    adapter: Adapter
    step_seconds: float | None
    loss: float
    kept_energy: float | None
    bytes: int


@dataclass
class StepWatch:
    """Training hooks that time steps and report them."""

    steps: int
    on_step_done: OnStep | None = None
    seconds: list[float] = field(default_factory=list)

    def on_step(self, step: int, loss: float, seconds: float) -> None:
        """Keep the time and tell."""
        self.seconds.append(seconds)
        if self.on_step_done is not None:
            self.on_step_done(step, self.steps)

    def on_sample(self, step: int, prompt: str, png: bytes) -> None:
        """Do nothing: the protocol draws its own."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Do nothing."""

    def should_stop(self) -> bool:
        """Never: who wants to stop ends the process, and the checkpoint takes it up again."""
        return False

    def at(self, name: str) -> None:
        """Do nothing."""


class School:
    """Trains on one base model and keeps what comes out below `folder`."""

    def __init__(self, base: BaseModel, factors: SpectralFactors, folder: Path) -> None:
        self._base, self._factors, self._folder = base, factors, folder

    def teach(self, spec: TrainingSpec, pictures: Sequence[Image.Image], on_step: OnStep | None = None) -> Taught:
        """Return the adapter of a job: from the folder, or trained now, going on where a stopped process left off.

        Raises what run_training raises.
        """
        name = fingerprint_job(spec, pictures, self._base.base_hash)[:_NAME_LENGTH]
        file, facts = self._folder / f"{name}.safetensors", self._folder / f"{name}.json"
        if not (file.is_file() and facts.is_file()):
            self._train(spec, pictures, name, on_step)
        known: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        return Taught(read_adapter(file, self._base.layout, _LIMITS), **known, bytes=file.stat().st_size)

    def step_seconds(self, spec: TrainingSpec, pictures: Sequence[Image.Image]) -> float:
        """Wall seconds of a step of such a job, from a few that are thrown away."""
        watch = StepWatch(spec.steps)
        self._run(spec, pictures, self._folder / "probe", watch)
        shutil.rmtree(self._folder / "probe", ignore_errors=True)
        return median(watch.seconds)

    def _train(self, spec: TrainingSpec, pictures: Sequence[Image.Image], name: str, on_step: OnStep | None) -> None:
        workdir = self._folder / f"{name}.work"
        watch = StepWatch(spec.steps, on_step)
        result = self._run(spec, pictures, workdir, watch)
        tail = result.losses[-20:]
        facts = {
            "step_seconds": median(watch.seconds) if watch.seconds else None,
            "loss": sum(tail) / max(1, len(tail)),
            "kept_energy": result.kept_energy,
        }
        _keep(self._folder / f"{name}.safetensors", write_adapter(result.adapter))
        _keep(self._folder / f"{name}.json", json.dumps(facts).encode())
        shutil.rmtree(workdir, ignore_errors=True)

    def _run(
        self, spec: TrainingSpec, pictures: Sequence[Image.Image], workdir: Path, watch: StepWatch
    ) -> TrainingResult:
        workdir.mkdir(parents=True, exist_ok=True)
        return run_training(
            spec,
            pictures,
            base=self._base,
            factors=self._factors,
            clip=None,
            workdir=workdir,
            hooks=watch,
            class_folder=self._folder / "class-pictures",
        )


def _keep(path: Path, data: bytes) -> None:
    def write(file: Path) -> None:
        file.write_bytes(data)

    write_atomically(path, write)
