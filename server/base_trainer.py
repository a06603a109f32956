"""Training on the base model of the settings, loaded once for all jobs of a worker."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from PIL import Image

from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.cuda_lane import CudaLane
from hueshift.engines.svd_cache import SpectralFactors, load_factors
from hueshift.server.job_run import JobRun
from hueshift.server.settings import Settings
from hueshift.server.worker import Trained
from hueshift.training.cost import SpeedBook, open_speeds
from hueshift.training.devices import prepare_device
from hueshift.training.held_factors import HeldFactors
from hueshift.training.run import TrainingResult, run_training
from hueshift.training.scores import ClipScorer
from hueshift.training.sharing.compiled import inductor
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.spec import TrainingSpec

_CLASS_FOLDER = "class-pictures"


class BaseTrainer:
    """Runs `hueshift.training.run.run_training` on one base model.

    Class pictures are shared by all jobs, below `cache`; `speeds` remembers what steps take. With `sharing` jobs that
    run in several threads take their steps together; without it `held` has the factors on the device for all of them.
    """

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        clip: ClipScorer | None,
        cache: Path,
        speeds: SpeedBook,
        sharing: SharedTraining | None = None,
        held: HeldFactors | None = None,
    ) -> None:
        self._base, self._factors, self._clip = base, factors, clip
        self._cache, self._speeds, self._sharing, self._held = cache, speeds, sharing, held

    @classmethod
    def load(cls, settings: Settings, device: str = "cpu") -> Self:
        """Load the base model, its decomposition and its CLIP. Raises InvalidArgument on an unusable folder."""
        prepare_device(torch.device(device))
        base = load_base_model(settings.model.path, device=device)
        clip = None if settings.model.clip_path is None else ClipScorer(settings.model.clip_path)
        cache = settings.store.cache_path.expanduser()
        factors, training = load_factors(base, cache), settings.training
        captures = training.compile != "none" and device != "cpu"
        # On the CPU layers hold the factors as they are, but for convolutions.
        held = None if device == "cpu" else HeldFactors(base, factors)
        sharing = None
        # A job alone has its graph as a company of one.
        if training.jobs_per_worker > 1 or captures:
            sharing = SharedTraining(
                base,
                factors,
                max_rows=training.shared_rows,
                patience=training.shared_wait_seconds,
                lane=CudaLane(torch.device(device)) if captures else None,
                compiler=inductor if training.compile == "inductor" else None,
                held=held,
            )
        return cls(base, factors, clip, cache, open_speeds(cache), sharing, held)

    def train(
        self,
        spec: TrainingSpec,
        pictures: Sequence[Image.Image],
        masks: Mapping[int, Image.Image],
        work: Path,
        run: JobRun,
    ) -> Trained:
        """Train, resuming from `work`."""
        result = run_training(
            spec,
            pictures,
            base=self._base,
            factors=self._factors,
            clip=self._clip,
            workdir=work,
            hooks=run,
            masks=masks,
            class_folder=self._cache / _CLASS_FOLDER,
            sharing=self._sharing,
            held=self._held,
        )
        self._speeds.record(self._base.base_hash, spec, result.steps_taken, result.step_seconds)
        return Trained(result.adapter, _numbers(result), step=len(result.losses))


def _numbers(result: TrainingResult) -> dict[str, float] | None:
    """What the job's record keeps of a result: scores, and how much of it was kept."""
    scores = {} if result.scores is None else asdict(result.scores)
    numbers: dict[str, float] = {name: score for name, score in scores.items() if score is not None}
    if result.kept_energy is not None:
        numbers["kept_energy"] = result.kept_energy
    if result.inversion is not None:
        numbers |= {"inversion_error": result.inversion.tuned, "inversion_error_base": result.inversion.base}
    return numbers or None
